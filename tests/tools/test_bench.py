"""python -m tools.bench gpu: every section runs at a tiny size, and every check can fail."""
import time
from dataclasses import replace

import pytest
import torch
from helpers import one_line
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
import ppo
from data import collate
from model import RewardModel, branch_mask
from tools import bench, gpu_checks, gpu_speed
from tools.gpu_checks import CPU, ROUNDOFF
from tools.gpu_speed import Bench

TINY_RUN = ["gpu", "--device=cpu", "--tiny"]
PRINTED = {  # by section, beside its time
    "machine": "matrix product 32^3, bf16",
    "correctness": "gradients, fp16 compiled (relative)",
    "reward": "mark of 45 % on the longer rows",
    "sampling": "3 rows: ",
    "ppo": "iteration 2: ",
    "shapes": "attention plain, heads 4 of 2: new ",
    "stages": "reward, lora_rank=4: exit code 0: ok",
    "memory": "error: the memory is full",
}


@pytest.fixture(autouse=True)
def same_precision():
    """A section leaves the precision of products as open_run sets it."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def tiny_bench():
    return Bench(CPU, tiny=True, explore=False, rates={}, failures=[])


@pytest.fixture(scope="module")
def small():
    return gpu_checks.make_small(Bench(CPU, True, False, {}, []))


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("name", bench.SECTIONS)
def test_each_section_runs_on_a_cpu(name, capsys):
    assert bench.main([*TINY_RUN, f"--only={name}"]) == 0
    out = capsys.readouterr().out
    assert PRINTED[name] in out
    assert f"\n{name}: " in out
    assert "sections that failed: none" in out
    assert out.endswith("checks that are NOT ok: none\n"), out


def test_exploring_names_what_costs_time(capsys, monkeypatch):
    monkeypatch.setattr(gpu_speed, "SHAPES", {"SmolLM2-135M": gpu_speed.TINY})
    assert bench.main([*TINY_RUN, "--only=reward", "--explore"]) == 0
    out = capsys.readouterr().out
    assert "profile of one step: " in out
    assert "without the branch mask (is_causal), 2 rows of " in out
    assert "bool mask, repeated keys, plain: " in out
    assert "sections that failed: none" in out
    assert out.endswith("checks that are NOT ok: none\n"), out


def test_without_a_gpu_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["gpu"]) == 2
    one_line(capsys, "no CUDA device")


@pytest.mark.parametrize("words, part", [
    (["gpu", "--only=machine,speed"], "must be one or more of machine, correctness"),
    (["gpu", "--device=tpu"], "must be --explore"),
])
def test_wrong_words_are_one_line(words, part, capsys):
    assert bench.main(words) == 2
    one_line(capsys, part)


def test_a_section_that_fails_or_takes_too_long_is_one_line(capsys, monkeypatch):
    def fails(bench):
        raise RuntimeError("a kernel is missing\nand more")

    def never_ends(bench):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass

    def says(bench):
        gpu_speed.say("the third section")

    sections = {
        "machine": bench.Section(fails, 9),
        "ppo": bench.Section(never_ends, 0.3),
        "memory": bench.Section(says, 9),
    }
    monkeypatch.setattr(bench, "SECTIONS", sections)
    assert bench.main(TINY_RUN) == 0
    out = capsys.readouterr().out
    assert "machine FAILED: RuntimeError: a kernel is missing and more (test_bench.py:" in out
    assert "ppo FAILED: cut off after 0 s at " in out and "test_bench.py:" in out
    assert "the third section" in out
    assert "sections that failed: machine, ppo" in out


def test_sections_have_the_kernels_of_a_run(monkeypatch):
    """cuDNN's attention is off, whatever a section before has set."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    seen = []

    def work(bench):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(True)

    monkeypatch.setattr(bench, "SECTIONS", {
        "machine": bench.Section(work, 9), "ppo": bench.Section(work, 9)})
    assert bench.main(TINY_RUN) == 0
    assert seen == [False, False]


def test_no_section_begins_after_the_time_for_all(tiny_bench, capsys):
    assert not bench.run_section("machine", tiny_bench, deadline=time.perf_counter())
    assert "no time is left" in capsys.readouterr().out


def test_a_part_that_fails_is_noted_and_the_next_one_runs(tiny_bench, capsys):
    def work(x):
        return 1 / x

    gpu_speed.attempt(tiny_bench, "a part", work, 0)
    gpu_speed.attempt(tiny_bench, "another", work, 1)
    assert tiny_bench.failures == ["a part"]
    assert capsys.readouterr().out.startswith("a part FAILED: ZeroDivisionError")


# --------------------------------------------------------------------------------------------------
# The checks can fail


@pytest.mark.parametrize("precision", ROUNDOFF)
def test_a_wrong_mask_is_noticed_in_every_precision(small, tiny_bench, precision, monkeypatch):
    reference = gpu_checks.outputs_of(small, CPU, "float32")
    causal = gpu_speed.causal_instead(branch_mask)
    monkeypatch.setattr(model_file, "branch_mask", causal)
    outputs = gpu_checks.outputs_of(small, CPU, precision)
    gpu_checks.compare_outputs(tiny_bench, small, precision, outputs, reference, precision)
    assert f"rewards, {precision}" in tiny_bench.failures
    assert f"gradients, {precision} (relative)" in tiny_bench.failures
    assert not any(name.startswith("log-prob") for name in tiny_bench.failures)  # one branch


def test_log_probabilities_and_numbers_that_are_not_finite_are_noticed(small, tiny_bench):
    reference = gpu_checks.outputs_of(small, CPU, "float32")
    outputs = dict(reference)
    outputs["log-probabilities"] = reference["log-probabilities"] * 1.001
    outputs["rewards"] = reference["rewards"] * torch.nan
    gpu_checks.compare_outputs(tiny_bench, small, "a", outputs, reference, "float32")
    assert tiny_bench.failures == ["rewards, a", "log-probabilities, a"]


def test_the_tolerance_of_half_precision_is_near_what_is_seen(small, tiny_bench, capsys):
    """It is no more than 50 times the largest of few differences that the CPU has in bf16."""
    reference = gpu_checks.outputs_of(small, CPU, "float32")
    outputs = gpu_checks.outputs_of(small, CPU, "bf16")
    gpu_checks.compare_outputs(tiny_bench, small, "bf16", outputs, reference, "bf16")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        amount, allowed = line.partition(": ")[2].replace(": ok", "").split(", allowed ")
        assert float(amount) < float(allowed) < 50 * float(amount)


def test_other_weights_change_greedy_sampling(small, tiny_bench, monkeypatch):
    build = gpu_checks.small_model
    seeds = iter((0, 1))

    def with_noise(kind, small, device):
        model = build(kind, small, device)
        torch.manual_seed(next(seeds))
        with torch.no_grad():
            model.lm_head.weight.add_(0.1 * torch.randn(model.lm_head.weight.shape))
        return model

    monkeypatch.setattr(gpu_checks, "small_model", with_noise)
    gpu_checks.check_greedy(tiny_bench, small)
    assert len(tiny_bench.failures) == 1


def test_a_scaler_that_skips_no_step_is_noticed(small, tiny_bench, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *arguments, **options: scaler)
    gpu_checks.check_scaler(tiny_bench, small)
    names = [name.partition(", ")[2] for name in tiny_bench.failures]
    assert "overflow: no weight has changed" in names
    assert "overflow: the scale is halved" in names


def test_scores_of_another_distribution_are_noticed_in_ppo(small, tiny_bench, monkeypatch):
    evaluate = ppo.evaluate_tokens

    def shifted(*arguments):
        logprob, value = evaluate(*arguments)
        return logprob - 0.2, value

    monkeypatch.setattr(ppo, "evaluate_tokens", shifted)
    gpu_checks.check_first_step(tiny_bench, small)
    assert len(tiny_bench.failures) == len(ROUNDOFF)


def test_another_step_size_is_noticed_in_metarm(small, tiny_bench, monkeypatch):
    compute = gpu_checks.meta_gradient_of
    steps = iter((0.1, 0.101, 0.1, 0.101))

    def other_step(*arguments):
        return compute(*arguments, eta=next(steps))

    monkeypatch.setattr(gpu_checks, "meta_gradient_of", other_step)
    gpu_checks.check_meta(tiny_bench, small)
    assert len(tiny_bench.failures) == 2


def test_work_that_fits_into_memory_is_noticed(tiny_bench, monkeypatch):
    monkeypatch.setattr(gpu_checks, "fill_memory", lambda device: None)
    gpu_checks.memory(tiny_bench)
    assert len(tiny_bench.failures) == 2


def test_a_stage_that_fails_is_noticed(tiny_bench, monkeypatch):
    monkeypatch.setattr(gpu_checks.train, "main", lambda words: 2)
    gpu_checks.stages(tiny_bench)
    names = [name.removesuffix(": exit code 2") for name in tiny_bench.failures]
    on_export = []
    for kind in ("train_layers=1", "lora_rank=4"):
        on_export += [f"sft, {kind}", f"reward, {kind}"]
    assert names == ["all stages", "export", *on_export]


# --------------------------------------------------------------------------------------------------
# What is counted


def test_rows_have_the_lengths_that_are_printed():
    for lengths, mean in ((gpu_speed.SHORT, 280), (gpu_speed.LONG, 512)):
        rows = gpu_speed.random_rows(200, lengths, 100)
        assert abs(sum(map(len, rows)) / len(rows) - mean) < 0.02 * mean


def test_allowed_pairs_are_those_of_the_mask():
    for row in gpu_speed.random_rows(3, gpu_speed.SHORT, 100):
        batch = collate([row])
        pairs, last = gpu_speed.allowed_pairs(row)
        assert pairs == int(branch_mask(batch.branch).sum())
        assert last == int(branch_mask(batch.branch, batch.last).sum())


def test_flops_of_a_step_are_those_that_torch_counts():
    """torch counts products of all pairs, allowed or not; and the head, 2 C for each output."""
    shape = replace(gpu_speed.TINY, kv_heads=3)
    row = gpu_speed.random_rows(1, (40, 10, 20), shape.vocab)[0]
    batch = collate([row])
    model = gpu_speed.random_model(RewardModel, shape, CPU)
    with FlopCounterMode(display=False) as counter, gpu_speed.attention_by([SDPBackend.MATH]):
        model(batch.tokens, batch.branch, batch.position, batch.last).sum().backward()
    T = len(row)
    pairs, last = gpu_speed.allowed_pairs(row)
    not_allowed = (shape.layers - 1) * (T * T - pairs) + 2 * T - last
    expected = gpu_speed.step_flops(shape, [row]) + 3 * 4 * shape.width * not_allowed
    counted = counter.get_total_flops() - 3 * 2 * 2 * shape.width
    assert abs(counted - expected) < 0.03 * expected


def test_bytes_of_sampling():
    shape = gpu_speed.SHAPES["SmolLM2-135M"]
    assert abs(gpu_speed.sampling_bytes(shape, 0, 0) / 2 - 134.5e6) < 0.2e6  # its parameters
    a_token = gpu_speed.sampling_bytes(shape, 1, 1) - gpu_speed.sampling_bytes(shape, 0, 0)
    assert a_token == 30 * 2 * 3 * 64 * 2
