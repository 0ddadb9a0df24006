"""The contract of encoders from other libraries, for a few; `encoder_contract.py` itself tries all of them."""

from __future__ import annotations

import pytest
from encoder_contract import CASES, Contract
from encoders import need_transformers

need_transformers()


@pytest.mark.slow
def test_an_encoder_trains_resumes_and_is_extended_from_its_bundle(tmp_path):
    contract = Contract("hf:resnet", tmp_path)
    assert (contract.trains(), contract.resumes(), contract.exports(onnx=False)) == ("yes",) * 3
    assert contract.extends() == "yes"


@pytest.mark.slow
def test_a_graph_of_an_encoder_takes_any_size(tmp_path, monkeypatch):
    """Swin has all that sizes depend on: strides and shifted windows. Two stages trace in half the time of four."""
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    two = {**CASES["hf:swin"], "depths": [1, 2], "num_heads": [1, 2]}
    monkeypatch.setitem(CASES, "hf:swin", two)
    contract = Contract("hf:swin", tmp_path)
    assert contract.trains() == "yes"
    assert contract.exports().startswith("any size")


@pytest.mark.slow
def test_timm_itself(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    try:
        import timm

        assert timm.create_model
    except Exception as error:
        pytest.skip(f"timm cannot be imported (it needs a torchvision that fits torch): {error}")
    contract = Contract("timm:resnet18", tmp_path)
    found = [part().partition(",")[0] for part in contract.parts().values()]
    assert found == ["yes", "yes", "any size", "yes", "yes"]
