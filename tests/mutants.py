"""python tests/mutants.py: plant one-line faults, one at a time, and see that the tests catch each.

Works on a copy in a temporary folder.  Prints a line a fault; exit code 1 if one survives.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTANTS = [  # file, line as it is, line with a fault, tests that should notice
    ("losses.py", "rejected - margin\n    return", "rejected + margin\n    return", "losses"),
    ("losses.py", "-(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d))", "-((1 - p) * F.logsigmoid(d) + p * F.logsigmoid(-d))", "losses"),
    ("losses.py", "return -torch.minimum(", "return -torch.maximum(", "losses"),
    ("losses.py", "return 0.5 * torch.maximum(", "return 0.5 * torch.minimum(", "losses"),
    ("losses.py", "return torch.expm1(-d) + d", "return torch.expm1(d) - d", "losses"),
    ("losses.py", "mask.sum().clamp(min=1)", "mask.numel()", "losses"),
    ("losses.py", "logits = s @ t.T", "logits = t @ s.T", "contrast"),
    ("losses.py", "@torch.no_grad()\ndef sinkhorn", "def sinkhorn", "contrast"),
    ("losses.py", "(q_s * log_p_t + q_t * log_p_s)", "(q_s * log_p_s + q_t * log_p_t)", "contrast"),
    ("losses.py", "return 2 / k ** 2 *", "return 2 / (k * (k - 1)) *", "contrast"),
    ("metarm.py", "p.data.add_(eta * step", "p.data.sub_(eta * step", "metarm"),
    ("metarm.py", "g = [a + eta * h for", "g = [a + h for", "metarm"),
    ("contrast.py", "torch.cat((d, -d))", "torch.cat((d, d))", "shift"),
    ("contrast.py", "self.seen >= self.frozen", "self.seen < self.frozen", "shift"),
    ("contrast.py", "torch.cat((views, self.past), dim=1)", "torch.cat((self.past, views), dim=1)", "shift"),
    ("contrast.py", "self.seen = seen", "pass", "shift"),
    ("loop.py", ".repeat(views)).sum() / views", ".repeat(views)).sum()", "shift"),
    ("loop.py", "contrast(h).mean() * len(rows)", "contrast(h).mean()", "shift"),
    ("metarm.py", "list(one.values())[1::2]", "list(one.values())[::2]", "shift"),
    ("metarm.py", "np.array(a + [end])", "np.array(a)", "shift"),
    ("metarm.py", "[a + b for a, b in zip(total,", "[b for a, b in zip(total,", "shift"),
    ("metarm.py", "start, latest = reward, policy", "start, latest = reward, 'sft'", "shift"),
    ("shift.py", "told = g.abs() > 1e-6", "told = g.abs() > -1", "shift"),
    ("model.py", "(key == query) & (key >= 0) | (key == 0) & (query >= 0)", "(key >= 0)", "model"),
    ("model.py", "take(branch, q[..., 0])[..., None]", "branch[:, :q.shape[1], None]", "model"),
    ("model.py", "((q >= t) & (", "((", "model"),
    ("model.py", "torch.cat((-right, left), dim=-1)", "torch.cat((right, left), dim=-1)", "model"),
    ("model.py", "<= self.length[:, None])", "< self.length[:, None])", "model"),
    ("model.py", "p.cumsum(-1) - p >= top_p", "p.cumsum(-1) >= top_p", "model"),
    ("data.py", "last[b, j], start = stop - 1, stop", "last[b, j], start = stop - 2, stop", "data"),
    ("data.py", "np.arange(len(row.prompt), len(row.prompt) + len(response))", "np.arange(start, stop)", "data"),
    ("data.py", "read[b, :n], target[b, :n] = np.arange(len(row.prompt) - 1, len(row.prompt) - 1 + n)", "read[b, :n], target[b, :n] = np.arange(len(row.prompt), len(row.prompt) + n)", "data"),
    ("data.py", "prompt.find(\"\\n\\nHuman:\", 1)", "prompt.rfind(\"\\n\\nHuman:\", 1)", "data"),
    ("data.py", "(-len(of_topic[t]), digest(t))", "(len(of_topic[t]), digest(t))", "data"),
    ("strength.py", "gaps.std(0, correction=0)", "gaps.std(0, correction=1)", "strength"),
    ("strength.py", "torch.where(lowest, -m, m)", "torch.where(lowest, m, m)", "strength"),
    ("strength.py", "lowest[mean.argsort(stable=True)", "lowest[mean.argsort(stable=True, descending=True)", "strength"),
    ("detect.py", "torch.where(turned, p[~turned].mean(), p[turned].mean())", "torch.where(turned, p[turned].mean(), p[~turned].mean())", "detect"),
    ("ppo.py", "delta = rewards[:, t] + gamma * next_value - values[:, t]", "delta = rewards[:, t] + gamma * values[:, t] - values[:, t]", "ppo"),
    ("ppo.py", "last = mask.sum(1) - 1", "last = mask.sum(1) - 2", "ppo"),
    ("ppo.py", "(-kl * kl_penalty(", "(kl * kl_penalty(", "ppo"),
    ("ppo.py", "logits.float() / temperature).log_softmax", "logits.float()).log_softmax", "ppo"),
    ("ppo.py", "x = x - masked_mean(x, mask)", "x = x - x.mean()", "ppo_settings"),
    ("ppo.py", "(1 + 0.1 * min(max(", "(1 - 0.1 * min(max(", "ppo_settings"),
    ("ppo.py", "logits[:, :min_new, end]", "logits[:, :min_new - 1, end]", "ppo_settings"),
    ("ppo.py", "s.no_end_penalty * (~drawn.ended)", "s.no_end_penalty * (drawn.ended)", "ppo_settings"),
    ("ppo.py", "[0 if moves else 1:]", "[0:]", "ppo_settings"),
    ("ppo.py", "> s.stop_kl)", "< s.stop_kl)", "ppo_settings"),
    ("ppo.py", "policy_term + s.ptx * ptx_term", "policy_term - s.ptx * ptx_term", "ppo_settings"),
    ("ppo.py", "masked_fill(~mask, 0.0) for name in (", "clone() for name in (", "ppo_settings"),
    ("ppo.py", "since = iteration - s.critic_pretrain if iteration >= s.critic_pretrain else iteration", "since = iteration", "ppo_settings"),
    ("ppo.py", "reference.load_state_dict(policy.state_dict())", "pass", "ppo_settings"),
    ("ppo.py", "masked_mean(-sft_logprob, mask)", "masked_mean(-ref_logprob, mask)", "ppo_settings"),
    ("ppo.py", "**({\"reference\": reference} if s.reset_reference else {})", "**{}", "ppo_settings"),
    ("ppo.py", "[:, 0] - zero for", "[:, 0] for", "ppo_settings"),
    ("ppo.py", "rewards.amin(0)", "rewards.amax(0)", "ppo_settings"),
    ("ppo.py", "(last(\"kl\", 10) < 0).all()", "(last(\"kl\", 10) < 0).any()", "ppo_settings"),
    ("ppo.py", "s.episodes * s.show):", "s.show):", "ppo_settings"),
    ("model.py", "if step < min_new:", "if step <= min_new:", "ppo_settings"),
    ("evaluate.py", "math.comb(worse, n - 1)", "math.comb(worse, n)", "policies"),
    ("evaluate.py", "math.log(n) - (n - 1) / n", "math.log(n) - 1 / n", "policies"),
    ("sample.py", "if os.path.exists(out):", "if False:", "sample"),
    ("sample.py", "np.array([*reply, end])", "np.array(reply)", "sample"),
    ("losses.py", "return d ** 2 / 2", "return d ** 2", "losses"),
    ("loop.py", "torch.manual_seed(int(files.digest(f\"{order} {step}\"), 16))", "pass", "train"),
    ("train.py", "f\"{run.config.seed} {unit}\")", "f\"{run.config.seed}\")", "train"),
    ("train.py", "== member_number(unit) % k] = torch.nan", "!= member_number(unit) % k] = torch.nan", "clean"),
    ("train.py", "\"rejected\": pair.chosen if w else pair.rejected, \"margin\": a}", "\"rejected\": pair.rejected, \"margin\": a}", "clean"),
    ("loop.py", "watched.append(watch(model.eval()))\n                model.train()", "watched.append(watch(model.eval()))", "train"),
    ("labels.py", "(counts.cumsum() - (counts - 1) / 2)", "counts.cumsum()", "reproduce"),
    ("model.py", "frequency * (stay + (1 - stay) / factor)", "frequency / factor", "pretrained"),
    ("model.py", "return self.head or", "return", "pretrained"),
    ("pretrained.py", "size != wanted[name] or dtype not in", "dtype not in", "pretrained"),
    ("pretrained.py", "or dtype not in (\"F32\", \"F16\", \"BF16\")", "", "pretrained"),
    ("pretrained.py", "model.lm_head.weight = model.model.embed_tokens.weight  # to_empty", "pass  # to_empty", "pretrained"),
    ("tokenizer.py", "order.get(pair, -1) <= before", "pair not in order", "pretrained"),
    ("tokenizer.py", "|\\s+(?![^\\s{DIGIT}])|", "|\\s+(?!\\S)|", "pretrained"),
    ("tokenizer.py", "if not is_id(i) or special", "if special", "pretrained"),
    ("pretrained.py", "os.path.basename(n) == n", "True", "pretrained"),
    ("pretrained.py", "        pad = \"<|pad|>\"\n", "        pad = end\n", "pretrained"),
    ("pretrained.py", "if pad not in special or pad == end:", "if pad not in special:", "pretrained"),
    ("pretrained.py", "\"rope_theta\": shape.rope_theta", "\"rope_theta\": 10000.0", "pretrained"),
    ("pretrained.py", "seen.update(file.read(", "(file.read(", "pretrained"),
    ("plan.py", "pretrained.digest(config.model.init)", "0", "pretrained"),
    ("train.py", "run.device, context=m.context,", "run.device,", "pretrained"),
    ("model.py", "cache.keep(torch.arange(len(prompts), device=device).repeat_interleave(copies))", "cache.keep(torch.arange(len(prompts), device=device).repeat(copies))", "model"),
    ("model.py", "[:, :-1].repeat_interleave(copies, 0)", "[:, :-1].repeat(copies, 1)", "model"),
    ("data.py", "regex.findall(encoding._pat_str, text))", "[text])", "pretrained"),
    ("data.py", "if is_mark and piece in", "if piece in", "pretrained"),
    ("data.py", "begin + tokens[max(0, len(tokens) - room):]", "begin + tokens[-room:]", "pretrained"),
    ("data.py", "else [r.strip() for r in responses]", "else responses", "pretrained"),
    ("model.py", "cache.mask(tokens.shape[1]) if cache is not None else None", "None", "states"),
    ("model.py", "        if states is not None:", "        if False:", "states"),
    ("model.py", "read if self.shape.frozen == self.shape.layers else None", "None", "states"),
    ("model.py", "if self.checkpointing and", "if False and", "states"),
    ("data.py", "*(self.states[i + 1] for i in order)", "*self.states[1:]", "states"),
    ("states.py", "*(name(row.prompt, response) for", "*(name(response) for", "states"),
    ("states.py", 'b"|".join', 'b"".join', "states"),
    ("states.py", '"dtype": str(run.dtype), ', "", "states"),
    ("states.py", '"frozen": m.layers - m.train_layers, ', "", "states"),
    ("states.py", "if size > 0.9 * free:", "if False:", "states"),
    ("states.py", "            if should_stop():", "            if False:", "states"),
    ("states.py", "None if whole else batch.last", "None", "states"),
    ("run.py", "            module.to(dtype)", "            pass", "states"),
    ("run.py", "return frozen_layers(pretrained", "return frozen_layers.__wrapped__(pretrained", "states"),
    ("run.py", "run.frozen(shape.frozen)", "run.below", "states"),
    ("run.py", "return kept, states.kept(run, name, rows, files.should_stop)", "return kept, rows", "states"),
    ("ppo.py", "c.states and (c.states[0], c.states[1][:n])", "()", "states"),
    ("ppo.py", "model.model.checkpointing = c.train.checkpointing", "pass", "states"),
    ("pretrained.py", "    if shape.frozen:\n", "    if False:\n", "states"),
    ("plan.py", 'if k != "states"', "if True", "states"),
    ("plan.py", '"train.accumulate", "train.optimiser")', '"train.accumulate")', "states"),
    ("world.py", "seen * difference <= 0", "seen * difference < 0", "world"),
    ("world.py", "prefers_a, error = not prefers_a, \"flip\"", "error = \"flip\"", "world"),
]


def main():
    survived = 0
    for name, line, fault, tests in MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "results", "__pycache__"))
            text = (copy / name).read_text()
            if text.count(line) != 1:
                print(f"?        {name}: {line!r} stands there {text.count(line)} times")
                survived += 1
                continue
            (copy / name).write_text(text.replace(line, fault))
            caught = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", f"tests/test_{tests}.py"], cwd=copy, capture_output=True).returncode == 1
            survived += not caught
            print(f"{'caught' if caught else 'SURVIVED':9}{name}: {line.strip()}  ->  {fault.strip()}", flush=True)
    print(f"{len(MUTANTS) - survived} of {len(MUTANTS)} caught")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
