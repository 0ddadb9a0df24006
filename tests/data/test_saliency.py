"""The simple saliency, its command, and the check of further maps."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import everseg
from everseg.data.saliency_maps import frequency_tuned, salient
from everseg.errors import DataError
from saying import must_say

SMALL = ["options.num_train=3", "options.num_val=2", "options.size=[32,48]"]


def test_lab_and_distance_are_those_of_the_formula():
    # Two halves so large that their middles see no border. sRGB red is (53.24, 80.09, 67.20), black is 0 in CIELAB.
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255, 0, 0
    half = np.linalg.norm([53.24, 80.09, 67.20]) / 2
    found = frequency_tuned(image)
    np.testing.assert_allclose([found[20, 5], found[20, 35]], half, rtol=1e-3)
    assert (found[:, 18:22] < found[:, 5:6]).all()


def test_an_object_of_another_colour_is_salient_and_one_colour_has_none():
    image = np.full((40, 60, 3), 90, np.uint8)
    image[10:20, 10:20] = 220, 40, 30
    found = salient(image)
    assert (found[12:18, 12:18] == 255).all()
    assert (found[25:] == 0).all()
    assert salient(np.full((5, 5, 3), 7, np.uint8)).max() == 0


def test_the_command_writes_a_map_of_every_image_and_the_check_tells_the_missing_ones(tmp_path):
    made = everseg.data.saliency("demo", SMALL, out=tmp_path, quiet=True)
    assert made.images == 3
    files = sorted((tmp_path / "train").glob("*.png"))
    assert len(files) == 3
    given = [*SMALL, f"extra.saliency={tmp_path}"]
    assert not [f for f in everseg.data.check("demo", given, quiet=True).findings if f.code == "map"]
    files[0].unlink()
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(files[1])
    faults = [f for f in everseg.data.check("demo", given, quiet=True).findings if f.code == "map"]
    assert [f.sample for f in faults] == [files[0].stem, files[1].stem]
    must_say(faults[1].message, "4x5", "48x32")
    nowhere = [*SMALL, f"extra.saliency={tmp_path / 'no'}"]
    (fault,) = [f for f in everseg.data.check("demo", nowhere, quiet=True).findings if f.code == "map"]
    must_say(fault.message, "data.extra.saliency")
    with pytest.raises(DataError) as error:
        everseg.data.saliency("demo", SMALL, out=tmp_path, split="trian", quiet=True)
    must_say(error.value, "trian", "train")
