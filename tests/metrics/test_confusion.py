"""The confusion matrix counts every pixel once, exactly, and refuses what it cannot count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everseg.metrics import ConfusionMatrix, confusion


def slow_counts(prediction, label, classes) -> np.ndarray:
    out = np.zeros((classes, classes), np.int64)
    for p, y in zip(np.ravel(prediction).tolist(), np.ravel(label).tolist(), strict=True):
        if y != 255:
            out[y, p] += 1
    return out


def random_case(seed, classes, shape):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes + 1, shape)
    label[label == classes] = 255
    return torch.from_numpy(rng.integers(0, classes, shape)), torch.from_numpy(label)


def test_rows_are_truth_and_columns_predictions():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 0], [0, 2]]))
    assert matrix.counts.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    assert matrix.counts.dtype == torch.int64


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.sampled_from([1, 2, 7, 21, 151, 254, 255]),
    shape=st.sampled_from([(5,), (1, 1), (3, 4, 5), (0, 4)]),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
)
def test_equals_counting_one_by_one(seed, classes, shape, dtype):
    prediction, label = random_case(seed, classes, shape)
    matrix = ConfusionMatrix(classes)
    matrix.update(prediction.to(dtype), label.to(dtype))
    np.testing.assert_array_equal(matrix.counts.numpy(), slow_counts(prediction, label, classes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_blocks_and_the_form_for_other_devices_count_alike(dtype, monkeypatch):
    prediction, label = (ids.to(dtype) for ids in random_case(1, 151, (3, 40, 50)))
    expected = slow_counts(prediction, label, 151)
    for block in (1000, 777, 10**6):  # several, a rest, one
        monkeypatch.setattr(confusion, "_BLOCK", block)
        matrix = ConfusionMatrix(151)
        matrix.update(prediction, label)
        matrix.update(prediction.mT, label.mT)  # not contiguous
        np.testing.assert_array_equal(matrix.counts.numpy(), 2 * expected)
    elsewhere = ConfusionMatrix(151)
    elsewhere._table = elsewhere._count(prediction, label)
    np.testing.assert_array_equal(elsewhere.counts.numpy(), expected)


def test_batches_and_ranks_in_any_split_give_the_same_counts():
    prediction, label = random_case(0, 5, (6, 7, 8))
    single = ConfusionMatrix(5)
    single.update(prediction, label)
    ranks = [ConfusionMatrix(5) for _ in range(2)]
    for i in range(6):
        ranks[i % 2].update(prediction[i], label[i])
    assert torch.equal((ranks[0] + ranks[1]).counts, single.counts)
    assert torch.equal(ranks[0].counts + ranks[1].counts, single.counts)
    ranks[0].merge(ranks[1].counts)
    assert torch.equal(ranks[0].counts, single.counts)
    ranks[1].merge(ranks[0].counts.numpy())
    assert int(ranks[1].counts.sum()) > int(single.counts.sum())


def test_addition_leaves_both_sides_alone():
    one, two = ConfusionMatrix(2), ConfusionMatrix(2)
    one.update(torch.tensor([0]), torch.tensor([1]))
    total = one + two
    total.update(torch.tensor([0]), torch.tensor([1]))
    assert one.counts.tolist() == [[0, 0], [1, 0]]
    assert two.counts.sum() == 0
    assert total.counts.tolist() == [[0, 0], [2, 0]]


def test_writing_into_the_counts_leaves_the_matrix_alone():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0]), torch.tensor([1]))
    matrix.counts.zero_()
    assert matrix.counts.tolist() == [[0, 0], [1, 0]]


def test_permuting_the_classes_permutes_the_matrix():
    prediction, label = random_case(4, 6, (4, 9))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    table = torch.full((256,), 255)
    table[:6] = order
    plain, permuted = ConfusionMatrix(6), ConfusionMatrix(6)
    plain.update(prediction, label)
    permuted.update(table[prediction], table[label])
    assert torch.equal(permuted.counts[order][:, order], plain.counts)
    torch.testing.assert_close(permuted.iou()[order], plain.iou(), equal_nan=True)


def test_counts_beyond_float_precision_stay_exact():
    matrix = ConfusionMatrix(2)
    matrix.merge(torch.tensor([[2**53, 0], [0, 0]]))
    matrix.update(torch.tensor([0]), torch.tensor([0]))
    assert matrix.counts[0, 0].item() == 2**53 + 1


def test_iou_and_accuracy_by_hand_with_an_absent_class():
    matrix = ConfusionMatrix(3)
    matrix.merge(np.array([[6, 2, 2], [0, 5, 0], [0, 0, 0]]))  # class 2 is predicted, never true
    torch.testing.assert_close(
        matrix.iou(eps=0.0), torch.tensor([6 / 10, 5 / 7, torch.nan], dtype=torch.float64), equal_nan=True
    )
    torch.testing.assert_close(
        matrix.accuracy(eps=0.0), torch.tensor([6 / 10, 1.0, torch.nan], dtype=torch.float64), equal_nan=True
    )
    assert matrix.iou()[1].item() == 5 / (7 + 1e-6)


def test_empty_matrices_have_zero_counts_and_no_scores():
    matrix = ConfusionMatrix(2)
    assert matrix.counts.tolist() == [[0, 0], [0, 0]]
    assert matrix.iou().isnan().all()


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([0, 1], [0, 3], r" 1 pixel.* label of 3, .*0\.\.2, or 255.*ignored$"),
        ([0, 1], [-1, 254], r" 2 pixels.* label of -1, 254,"),
        ([0, 1], [256, -7], r" 2 pixels.* label of -7, 256,"),
        ([3, 0], [0, 0], r" 1 pixel.* prediction of 3, .*0\.\.2$"),
        ([-2, 400], [0, 0], r" 2 pixels.* prediction of -2, 400, .*0\.\.2$"),
        ([255, 0], [255, 0], r" 1 pixel.* prediction of 255, .*0\.\.2$"),
        ([9, 0], [0, 8], r"label of 8, .*; 1 pixel.* prediction of 9"),
    ],
)
def test_values_out_of_range_raise_at_once_and_count_nothing(prediction, label, message):
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(torch.tensor(prediction), torch.tensor(label))
    assert matrix.counts.sum() == 0


def test_uint8_labels_out_of_range_raise():
    with pytest.raises(ValueError, match="label of 254"):
        ConfusionMatrix(3).update(torch.zeros(1, dtype=torch.uint8), torch.tensor([254], dtype=torch.uint8))


def test_wrong_shapes_types_and_sizes_raise():
    matrix = ConfusionMatrix(3)
    ids = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="shape and device"):
        matrix.update(ids, ids[0])
    with pytest.raises(ValueError, match=r"integer prediction, got torch\.float32"):
        matrix.update(ids.float(), ids)
    with pytest.raises(ValueError, match=r"integer label, got torch\.bool"):
        matrix.update(ids, ids.bool())
    with pytest.raises(ValueError, match="cannot merge 4 classes into 3"):
        matrix.merge(ConfusionMatrix(4))
    with pytest.raises(ValueError, match="cannot merge 2 classes into 3"):
        matrix.merge(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="square matrix"):
        matrix.merge(np.zeros((3, 3)))
    for wrong in (0, 65535):
        with pytest.raises(ValueError, match="num_classes must be in"):
            ConfusionMatrix(wrong)


def test_started_in_inference_mode_goes_on_outside():
    matrix = ConfusionMatrix(2)
    ids = torch.tensor([0, 1])
    with torch.inference_mode():
        matrix.update(ids, ids)
    matrix.update(ids, ids)
    matrix.merge(matrix.counts)
    assert matrix.counts.tolist() == [[4, 0], [0, 4]]


def test_update_off_the_cpu_reads_nothing_back():
    """Tensors of the meta device have no values: any read, as any wait for a GPU, raises."""
    matrix = ConfusionMatrix(21)
    ids = torch.zeros(4, 8, 8, dtype=torch.long, device="meta")
    matrix.update(ids, ids)
    matrix.update(ids, ids.to(torch.uint8))
    with pytest.raises((RuntimeError, NotImplementedError)):
        matrix.counts.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_counts_without_waiting_and_raises_when_read():
    prediction, label = random_case(0, 21, (2, 64, 64))
    on_device = prediction.cuda(), label.cuda()
    matrix = ConfusionMatrix(21)
    torch.cuda.set_sync_debug_mode("error")
    try:
        matrix.update(*on_device)
        matrix.update(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert matrix.counts.is_cuda
    np.testing.assert_array_equal(matrix.counts.cpu().numpy(), 2 * slow_counts(prediction, label, 21))
    matrix.update(torch.tensor([0, 30]).cuda(), torch.tensor([33, -5]).cuda())
    with pytest.raises(ValueError, match=r"label.*below 0, 33, .*prediction.* 21 "):
        matrix.iou()
