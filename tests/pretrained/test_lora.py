"""pretrained/lora.py: adapters compute what PEFT's do, start from the base and share it."""
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import TINY, go, one_line, random_rows, same, tensors, tiny
from small_runs import PRETRAINED, forget, stop_after, write_base
from torch.nn.attention import SDPBackend, sdpa_kernel

import sample
from common import build_model, compile_blocks, load_model, make_optimizer, score_rows
from config import ConfigError
from data import Row, collate
from losses import bradley_terry, difference
from metarm import gradient, meta_gradient
from model import LanguageModel, RewardModel
from pretrained import export, frozen, lora, weights
from pretrained.lora import LoraLinear
from runtime.run import open_run
from train import check_stages, parse_args

SETTINGS = [
    *PRETRAINED,
    "--data.limit=40", "--model.lora_rank=2", "--reward.methods=flip",
    "--ppo.rollout_batch_size=4", "--ppo.max_new_tokens=6", "--evaluate.prompts=4",
]
MODELS = ("sft", "member_00", "reward_flip", "policy_flip")
BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a pretrained model of three layers in hf/ and pairs in mine.jsonl"""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def words(base):
    """The command line of a small run with adapters"""
    return [*SETTINGS, f"--data.train={base}/mine.jsonl", f"--model.init={base}/hf"]


@pytest.fixture(scope="module")
def trained(base, words):
    """Folder of a run of all stages"""
    assert go(base / "run", small=words) == 0
    return base / "run"


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def run_of(words, out="out/none"):
    return open_run(parse_args([*words, f"--out_dir={out}"])[0])


def adapted(run, kind=LanguageModel, **changes):
    """A model with random adapters; B as large as A, so that an adapter left out shows"""
    shape = replace(lora.load_language_model(run).shape, **changes)
    return with_random_weights(build_model(run, kind, shape))


def with_random_weights(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def plain(model):
    """The same function without adapters"""
    shape = replace(model.shape, lora_rank=0, frozen=0)
    out = type(model)(shape)
    out.load_state_dict(export.all_tensors(model), strict=not shape.tied)
    return out.eval()


def rewards_of(model, batch, **more):
    return model(batch.tokens, batch.branch, batch.position, batch.last, **more)


# --------------------------------------------------------------------------------------------------
# The adapters

@pytest.mark.filterwarnings("ignore")
def test_logits_and_gradients_equal_those_of_peft_on_the_same_weights(words, base):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    ours = adapted(run_of([*words, "--model.lora_alpha=5"]))
    settings = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, settings)
    state = {f"base_model.model.{name}": tensor for name, tensor in ours.state_dict().items()}
    loaded = peft.set_peft_model_state_dict(theirs, state)
    assert not loaded.unexpected_keys
    ours, theirs = ours.double(), theirs.double()
    tokens = torch.randint(200, (3, 20), generator=torch.Generator().manual_seed(0))
    logits = ours(tokens)
    expected = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    for a, b in zip(ours.parameters(), trained, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


def test_new_adapters_are_those_of_peft_and_change_nothing(words, base):
    model = lora.load_language_model(run_of(words)).eval()
    whole = weights.load(base / "hf", LanguageModel).eval()
    tokens = torch.randint(200, (3, 20))
    assert torch.equal(model(tokens), whole(tokens))
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    assert len(layers) == 3 * 7
    for layer in layers:
        assert not layer.lora_B.weight.any()
        a = layer.lora_A.weight * layer.in_features ** 0.5  # uniform from -1 to 1
        assert a.abs().max() <= 1 and a.abs().max() > 0.9
        assert abs(float(a.detach().std()) - 3 ** -0.5) < 0.15
    torch.rand(3)  # they depend on the seed alone
    assert same(lora.load_language_model(run_of(words)).state_dict(), model.state_dict())
    other = lora.load_language_model(run_of([*words, "--seed=1"]))
    assert not same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
def test_names_are_those_of_the_adapters_and_the_head(words, kind):
    model = adapted(run_of(words), kind)
    expected = set() if kind is LanguageModel else {"score.weight"}
    for i in range(3):
        for layer in BLOCK:
            expected |= {f"model.layers.{i}.{layer}.lora_{x}.weight" for x in "AB"}
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} == expected
    assert model.model.layers["0"].mlp.down_proj.lora_A.weight.shape == (2, 40)


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
@pytest.mark.parametrize("changes", [{}, {"frozen": 2}, {"lora_alpha": 3.0}])
def test_merged_weights_compute_the_same(words, kind, changes):
    model = adapted(run_of(words), kind, **changes)
    merged = plain(model)
    batch = collate(random_rows(5, 2, 1, vocab=200))
    torch.testing.assert_close(
        rewards_of(model, batch), rewards_of(merged, batch), atol=1e-4, rtol=1e-4
    )


def test_gradients_follow_from_those_of_the_merged_weights(words):
    """W + s B A: dL/dB = s dL/dW Aᵀ, dL/dA = s Bᵀ dL/dW"""
    model = adapted(run_of(words), RewardModel, lora_alpha=3.0)
    merged = plain(model)
    batch = collate(random_rows(5, 2, 1, vocab=200))
    for each in (model, merged):
        rewards_of(each, batch).square().sum().backward()
    torch.testing.assert_close(
        model.score.weight.grad, merged.score.weight.grad, atol=1e-4, rtol=1e-4
    )
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            dW = merged.get_submodule(path).weight.grad
            a = layer.lora_A.weight
            b = layer.lora_B.weight
            torch.testing.assert_close(b.grad, 1.5 * dW @ a.T, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(a.grad, 1.5 * b.T @ dW, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("second_order", [False, True])
def test_metarm_steps_back_through_adapters(words, second_order):
    model = adapted(run_of(words), RewardModel)
    parameters = dict(model.named_parameters())
    samples = collate(random_rows(3, 3, 1, vocab=200))
    pairs = collate(random_rows(4, 2, 2, vocab=200))

    def rewards(values, batch):
        inputs = (batch.tokens, batch.branch, batch.position, batch.last)
        return torch.func.functional_call(model, values, inputs)

    def spread(values=parameters):
        return difference(rewards(values, samples)).sum()

    def loss(values=parameters):
        return bradley_terry(*rewards(values, pairs).unbind(1)).sum()

    plain_step = torch.cat([v.flatten() for v in gradient(loss(), list(parameters.values()))])
    g = meta_gradient(parameters.values(), spread, loss, 0.02, second_order)
    with sdpa_kernel(SDPBackend.MATH):
        ascent = torch.autograd.grad(spread(), parameters.values(), create_graph=second_order)
    moved = {}
    for direction, (name, parameter) in zip(ascent, parameters.items()):
        moved[name] = parameter + 0.02 * direction
    expected = torch.autograd.grad(loss(moved), parameters.values())
    g, expected = (torch.cat([v.flatten() for v in vectors]) for vectors in (g, expected))
    assert (g - expected).norm() < 1e-3 * expected.norm()
    assert (plain_step - expected).norm() > 1e-2 * expected.norm()


def test_gradient_checkpointing_and_compiled_blocks_change_no_gradient(monkeypatch):
    """Six blocks make three graphs: of the first, whose input needs no gradient, of the last, which
    has fewer queries, and of the others."""
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    compile_anything = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda block, dynamic: compile_anything(block, backend=counter,
                                                                  dynamic=dynamic))
    torch._dynamo.reset()
    shape = replace(TINY, layers=6, lora_rank=2, lora_alpha=4.0)
    model = lora.build(RewardModel, shape, "cpu", tiny(layers=6).state_dict())
    model = with_random_weights(model).train()
    batch = collate(random_rows(4, 2, 3))
    gradients = []
    for each, checkpointing in ((model, False), (model, True), (compile_blocks(model), False)):
        each.model.gradient_checkpointing = checkpointing
        loss = rewards_of(each, batch).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert counter.frame_count == 3
    assert all(map(torch.equal, *gradients[:2]))
    assert all(map(torch.equal, *gradients[::2]))


# --------------------------------------------------------------------------------------------------
# The shared base

def buffers(model):
    """-> {name: place of the tensor in memory}"""
    return {name: t.data_ptr() for name, t in model.named_buffers()}


@pytest.mark.parametrize("num_frozen", [0, 2])
def test_all_models_of_a_process_share_the_base_and_none_trains_it(words, num_frozen):
    run = run_of(words)
    policy = adapted(run, frozen=num_frozen)
    critic = adapted(run, RewardModel, frozen=num_frozen)
    shared = buffers(critic)
    assert len(shared) == (3 - num_frozen) * 9 + 1 + (num_frozen == 0)
    assert shared.items() <= buffers(policy).items()
    own = {parameter.data_ptr() for parameter in critic.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in policy.parameters())
    before = {name: t.clone() for name, t in critic.named_buffers()}
    state = {name: t.clone() for name, t in critic.state_dict().items()}
    optimizer = make_optimizer(critic, "adamw", 0.1, 0.1)
    rewards_of(critic.train(), collate(random_rows(4, 2, 0, vocab=200))).sum().backward()
    optimizer.step()
    assert same(before, dict(critic.named_buffers()))
    assert not any(torch.equal(state[name], t) for name, t in critic.state_dict().items())


def test_frozen_blocks_below_are_those_of_the_trunk(words, tmp_path):
    run = run_of([*words, "--model.train_layers=1", f"--model.embeds_dir={tmp_path}"])
    model = lora.load_language_model(run).eval()
    assert model.trunk[0] is frozen.trunk_of(run)
    assert {name.split(".")[2] for name in model.state_dict()} == {"2"}
    tokens = torch.randint(200, (3, 20))
    whole = weights.load(run.cfg.model.init, LanguageModel)
    torch.testing.assert_close(model(tokens), whole(tokens))


def test_in_half_precision_matrices_of_the_base_are_half_and_adapters_are_not(words):
    model = adapted(run_of([*words, "--dtype=bf16"]), RewardModel)
    layer = model.model.layers["0"].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16
    assert layer.merged_weight().dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# Whole runs

def test_every_model_of_a_run_holds_its_adapters_alone_and_has_learned(trained, words):
    start = lora.load_language_model(run_of(words)).state_dict()
    for name in MODELS:
        state = tensors(trained, name)
        assert all("lora_" in key or key == "score.weight" for key in state)
        assert all(state[key].any() for key in state)
        assert not any(torch.equal(state[key], start[key]) for key in start)


@pytest.mark.parametrize("name, stage", [("sft", "sft"), ("policy_flip", "ppo")])
def test_stopped_and_resumed_equals_not_stopped(name, stage, trained, copied, words, capsys):
    forget(copied, name)
    (copied / f"{name}.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert go(copied, f"--stage={stage}", small=words) == 130
    assert go(copied, f"--stage={stage}", small=words) == 0
    assert f"{name}: resumes at step 1" in capsys.readouterr().out
    assert same(tensors(trained, name), tensors(copied, name))


def test_exported_models_compute_the_same_without_adapters(trained, words, tmp_path):
    run = run_of(words, trained)
    batch = collate(run.valid.rows)
    for name, kind in (("policy_flip", LanguageModel), ("reward_flip", RewardModel)):
        ours = load_model(run, kind, name)
        export.save(tmp_path / name, ours, run.tokenizer)
        theirs = weights.load(tmp_path / name, kind, context=96)
        expected = rewards_of(theirs, batch)[..., :ours.shape.vocab]  # without the padding's logit
        torch.testing.assert_close(rewards_of(ours, batch), expected, atol=1e-4, rtol=1e-4)


def test_adapters_refuse_another_base_and_other_files(base, words, copied, tmp_path):
    other = tiny(seed=1, **vars(weights.shape_of(str(base / "hf"))))
    export.save(tmp_path / "hf", other, run_of(words, copied).tokenizer)
    run, _, _ = sample.open_finished_run(str(copied), init=str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match="reward_flip.pt: was trained on the frozen layers of an"):
        load_model(run, RewardModel, "reward_flip")
    run = run_of(words, copied)
    state = torch.load(copied / "reward_flip.pt", weights_only=True)
    state["shape"]["lora_rank"] = 3
    run.save_tensors("other.pt", state)
    with pytest.raises(OSError, match="other.pt: holds no RewardModel"):
        load_model(run, RewardModel, "other")


def test_a_finished_run_is_opened_by_what_its_files_say(trained):
    run, policy, reward = sample.open_finished_run(str(trained))
    assert load_model(run, LanguageModel, policy).shape.lora_rank == 2
    row = Row(run.valid.rows[0].prompt, run.valid.rows[0].responses)
    rewards = score_rows(run, load_model(run, RewardModel, reward), [row])
    assert rewards.shape == (1, 2) and rewards[0, 0] != rewards[0, 1]


def test_settings_of_adapters_make_models_again_where_there_are_any(words, trained):
    def known(*more):
        run = run_of([*words, *more], trained)
        check_stages(run)
        return run.known["sft"]

    assert known().reason == ""
    assert known("--model.lora_alpha=8").reason == "again: model.lora_alpha was 16.0, is 8.0"
    without = known("--model.lora_rank=0")
    assert without.reason == "again: model.lora_rank was 2, is 0"
    assert not any("lora" in key for key in without.depends)  # nor in records of older versions


def test_rank_zero_is_the_model_without_adapters(words, base):
    run = run_of([*words, "--model.lora_rank=0", "--model.lora_alpha=3"])
    model = frozen.load_language_model(run)
    whole = weights.load(base / "hf", LanguageModel)
    assert same(model.state_dict(), whole.state_dict())
    assert not any(isinstance(layer, LoraLinear) for layer in model.modules())
    assert not list(model.buffers())


@pytest.mark.parametrize("more, parts", [
    (["--model.init=scratch"], ("model.lora_rank = 2", "needs a pretrained model.init")),
    (["--model.train_layers=0", "--sft.epochs=0", "--ppo.methods="], ("no block to adapt",)),
    (["--reward.init=x"], ("reward.init", "model.lora_rank")),
    (["--model.lora_rank=-1"], ("model.lora_rank", "from 0 to 4096")),
    (["--model.lora_alpha=0"], ("model.lora_alpha", "from 0.001")),
])
def test_what_does_not_fit_is_one_line(words, tmp_path, more, parts, capsys):
    assert go(tmp_path / "out", *more, small=words) == 2
    one_line(capsys, *parts)
