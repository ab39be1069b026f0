"""One YAML gives one curve: on one process or under torchrun, packed or not, however it is held in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.curves import assert_same_curves
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import Project, metrics_of, write_rows

# fp32 sums in another order differ by about 1e-7 of a loss of 4; 1e-5 is promised, and 8 steps of
# Adam with eps 1e-4 stay within it (measured: 3e-7 in losses, 1e-6 of a gradient norm).
OTHER_ORDER = 1e-5


def test_a_run_under_torchrun_with_tp_2_is_the_run_in_one_process(
    one_process: Path, two_processes: Path
) -> None:
    truth = metrics_of(one_process)
    assert_same_curves(metrics_of(two_processes), truth, tolerance=OTHER_ORDER)
    assert truth[-1]["loss"] < truth[0]["loss"] - 0.1, "nothing was learned: the comparison is blind"


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_offloaded_reference_changes_no_number(
    ranks: int, project: Project, one_process: Path, two_processes: Path, tmp_path: Path
) -> None:
    offload = ("reference.placement=offload", f"parallel.tp={ranks}", f"run_dir={tmp_path / 'run'}")
    sftrl("sft", str(project.yaml), *offload, ranks=ranks)
    resident = one_process if ranks == 1 else two_processes
    # The same operations in the same order: not a bit may differ.
    assert_same_curves(metrics_of(tmp_path / "run"), metrics_of(resident), tolerance=0)


@pytest.mark.parametrize(
    "how",
    ["batch.micro_size=1", "batch.micro_size=8", "batch={global_size: 8, packing: true, max_tokens: 64}"],
)
def test_how_a_step_is_cut_into_microbatches_changes_nothing(
    how: str, project: Project, one_process: Path, tmp_path: Path
) -> None:
    sftrl("sft", str(project.yaml), how, f"run_dir={tmp_path / 'run'}")
    ours, truth = metrics_of(tmp_path / "run"), metrics_of(one_process)
    first = ("loss", "grad_norm", "nll", "entropy", "loss_tokens", "tokens")
    # One step: no error has grown yet, so the promised 1e-6 for micro-batch sizes and packing.
    assert {name: ours[0][name] for name in first} == pytest.approx(
        {name: truth[0][name] for name in first}, rel=1e-6, abs=1e-6
    )
    assert_same_curves(ours, truth, tolerance=OTHER_ORDER, except_for=("padding_share",))


def test_a_loss_of_ones_own_from_a_file_trains_like_the_one_it_copies(
    project: Project, one_process: Path, tmp_path: Path
) -> None:
    mine = f"loss={{name: my_gift, beta: 4.0, modules: [{project.my_loss}]}}"
    sftrl("sft", str(project.yaml), mine, f"run_dir={tmp_path / 'run'}")
    truth = [
        {name: value for name, value in row.items() if "gift/" not in name} for row in metrics_of(one_process)
    ]
    # gift with eps 0 is the same function: not a bit may differ.
    assert_same_curves(metrics_of(tmp_path / "run"), truth, tolerance=0)


def test_recomputing_activations_changes_no_number(
    project: Project, one_process: Path, tmp_path: Path
) -> None:
    sftrl("sft", str(project.yaml), "train.recompute=full", f"run_dir={tmp_path / 'run'}")
    # The block's forward is repeated as it was: not a bit may differ.
    assert_same_curves(metrics_of(tmp_path / "run"), metrics_of(one_process), tolerance=0)


def test_bf16_learns_too_and_starts_where_fp32_starts(
    project: Project, one_process: Path, tmp_path: Path
) -> None:
    sftrl("sft", str(project.yaml), "model.dtype=bf16", f"run_dir={tmp_path / 'run'}")
    ours, truth = metrics_of(tmp_path / "run"), metrics_of(one_process)
    # bf16 keeps 8 bits: activations and logits of order 1 err by 2^-9 each, some tens of them add up.
    assert ours[0]["loss"] == pytest.approx(truth[0]["loss"], abs=3e-2)
    assert ours[0]["loss"] != pytest.approx(truth[0]["loss"], abs=1e-6), "this was no bf16"
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1


def test_epochs_take_every_row_once_each_and_leave_an_incomplete_batch_out(
    project: Project, tmp_path: Path
) -> None:
    lengths = (1, 3, 9, 27, 50)  # no two pairs of them have the same sum: a step tells its rows
    rows = [{"prompt": "?", "response": "x" * length} for length in lengths]
    data = write_rows(tmp_path / "five.jsonl", rows)
    commands = [
        [
            "sft", str(project.yaml), f"data={{train: [{data}], max_length: 60}}", "batch.global_size=2",
            f"train={{epochs: {epochs}}}", f"run_dir={tmp_path / str(epochs)}",
        ]
        for epochs in (1, 2)
    ]  # fmt: skip
    for done in sftrl_each(commands):
        done.expect(0)
    one, two = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2")
    assert [len(one), len(two)] == [2, 5]  # 5 and 10 rows, two a step
    pairs = {left + right + 2: (left, right) for left in lengths for right in lengths}  # 2 end tokens
    taken = [set(pairs[int(step["loss_tokens"])]) for step in two]
    first_epoch, crossing, second_epoch = taken[0] | taken[1], taken[2], taken[3] | taken[4]
    assert len(first_epoch) == len(second_epoch) == 4
    assert crossing == (set(lengths) - first_epoch) | (set(lengths) - second_epoch)
    assert [step["tokens"] for step in two] == [step["loss_tokens"] + 2 * 2 for step in two]
    assert two[-1]["epoch"] == pytest.approx(2)
    assert_same_curves(one, two[:2], tolerance=0)
