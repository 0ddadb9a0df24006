"""What a run cannot do is refused before its folder exists, so that the corrected command can take the same name."""

from __future__ import annotations

import pytest
from toy import settings

import everseg
from everseg.errors import ConfigError
from saying import must_say

OWN = """
from dataclasses import dataclass

from everseg.errors import ConfigError
from everseg.methods.ft import FineTuning


@dataclass(kw_only=True)
class Picky(FineTuning):
    def grow(self, model, step):
        if step.index == {refused}:
            raise ConfigError("Picky dislikes this network")
        super().grow(model, step)
"""


def refusal(folder, **changes) -> ConfigError:
    """Start a run of a few seconds, which must be refused and leave no folder."""
    config = settings(folder, **changes)
    if "model" not in changes:
        config["model"]["options"].pop("compensation", None)
    with pytest.raises(ConfigError) as caught:
        everseg.run(quiet=True, **config)
    assert not (folder / "toy").exists()
    return caught.value


def test_a_network_that_the_method_refuses(tmp_path):
    problem = refusal(tmp_path, method={"name": "rcil"})
    must_say(problem, "rcil", "model.options.compensation=true")
    assert len(problem.problems) == 1
    everseg.run(quiet=True, **settings(tmp_path, method={"name": "rcil"}, train={"max_iterations": 1}))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("refused", [0, 1])
def test_a_network_that_an_own_method_refuses_in_some_step(tmp_path, refused, batch):
    (tmp_path / "own.py").write_text(OWN.replace("{refused}", str(refused)))
    own = {"name": f"{tmp_path / 'own.py'}:Picky"}
    problem = refusal(tmp_path, method=own, train={"batch": batch}, model={"norm": "bn"})
    must_say(problem, "Picky", *(["step 1"] if refused else []))


@pytest.mark.parametrize("joint", [False, True])
def test_switches_without_a_later_step(tmp_path, joint):
    scenario = {"task": "2-1", "joint": True} if joint else {"task": "offline"}
    must_say(
        refusal(tmp_path, method={"name": "ft", "fuse": "all"}, scenario=scenario), "method.fuse", "step"
    )
    must_say(
        refusal(tmp_path, method={"name": "ft", "pretune": 1}, scenario=scenario), "method.pretune", "step"
    )


def test_every_setting_that_an_architecture_lacks_is_told_at_once(tmp_path):
    model = {"name": "erfnet", "options": {}, "output_stride": 8, "norm": "abn"}
    problem = refusal(tmp_path, model=model)
    must_say(problem, "erfnet", "model.output_stride=8", "model.norm=abn")
    must_say(problem, "model.output_stride=null model.norm=null")


def test_idle_settings_are_noted(tmp_path, capsys):
    method = {"name": "ft", "pretune_lr_scale": 2.0}
    everseg.run(**settings(tmp_path, method=method, train={"max_iterations": 1}))
    must_say(capsys.readouterr().err, "note", "method.pretune_lr_scale=2.0")
