"""On-policy distillation, the whole method in one file.

    python examples/one_file.py

A student model answers; a teacher model says, at every token of those answers, which distribution it would have drawn from; the
student moves its own distribution there. Three things make this different from training on the teacher's answers:

* the answers are the student's own, so it is corrected in the very states it gets itself into;
* every token carries a full distribution as its signal, not one bit per answer as a reward would;
* nobody needs to know the right answer: below, the teacher never sees one, and the loss neither.

The task is to sort eight digits, because two cores learn it in a minute. The teacher was trained on correct answers, the student
on answers in which many digits are wrong. Watch the reverse KL fall and the accuracy rise.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd.losses import reverse_kl, to_logp, token_weights, weighted_sum

# ---------------------------------------------------------------------------------------------------------------- the task

DIGITS = 8
VOCABULARY = [*"0123456789", ">", "<eos>", "<pad>"]  # a token's id is its place in this list
EOS, PAD = VOCABULARY.index("<eos>"), VOCABULARY.index("<pad>")
WRONG = (
    0.13,
    0.13,
    0.26,
    0.26,
    0.39,
    0.39,
    0.52,
    0.52,
    0.78,
    0.78,
)  # how often the student's corpus gets each digit wrong


def encode(text: str) -> list[int]:
    return [VOCABULARY.index(character) for character in text]


def draw(generator: random.Random) -> tuple[list[int], list[int]]:
    """A prompt such as '31415926>' and its answer '11234569<eos>', as token ids."""
    digits = [generator.randrange(10) for _ in range(DIGITS)]
    return encode("".join(map(str, digits)) + ">"), [*sorted(digits), EOS]


def spoil(answer: list[int], generator: random.Random) -> list[int]:
    """The answer as a bad textbook prints it: large digits are often replaced by another one."""
    return [
        (token + generator.randrange(1, 10)) % 10 if token != EOS and generator.random() < WRONG[token] else token
        for token in answer
    ]


# -------------------------------------------------------------------------------------------------------------- the models


def new_model(seed: int) -> PreTrainedModel:
    """A Qwen3 of 0.1 million parameters. Any causal language model would do, if both have the same tokenizer."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen3ForCausalLM(config).eval()  # no dropout: the student that learns is the student that sampled


def fit(model: PreTrainedModel, *, spoilt: bool, steps: int, seed: int) -> PreTrainedModel:
    """Ordinary supervised training, to have a teacher and a student to start from. Not part of the method."""
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 50, (steps - s) / steps))
    for _ in range(steps):
        pairs = [draw(generator) for _ in range(128)]
        prompts = torch.tensor([prompt for prompt, _ in pairs])
        answers = torch.tensor([spoil(answer, generator) if spoilt else answer for _, answer in pairs])
        loss = F.cross_entropy(response_logits(model, prompts, answers).flatten(0, 1), answers.flatten())
        apply_gradient(loss, model, optimizer)
        schedule.step()
    return model


def response_logits(model: PreTrainedModel, prompts: Tensor, responses: Tensor) -> Tensor:
    """Logits [rows, response length, vocabulary]: row r, column t is the model's distribution of response token t.

    The shift by one: what a model puts out at position i is its prediction of token i + 1. With p prompt tokens, response token 0
    stands at position p, so it is predicted at p − 1, and response token t at p − 1 + t. Get this wrong by one, and the student is
    taught to say the next token now, with a loss that still falls.

    No attention mask is needed here: prompts are of equal length, padding comes last, and a causal model does not look ahead.
    """
    p, t = prompts.shape[1], responses.shape[1]
    logits = model(input_ids=torch.cat([prompts, responses], dim=1), use_cache=False).logits
    return logits[:, p - 1 : p - 1 + t]


def apply_gradient(loss: Tensor, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# -------------------------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor, *, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """The model's own responses, and which of their positions count.

    The samples come from the plain distribution: temperature 1, no top-k, no top-p. Anything else would be somebody else's samples,
    and the loss below would be an expectation under the wrong distribution.
    """
    sequences = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=DIGITS + 2,
        do_sample=not greedy,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    responses = sequences[:, prompts.shape[1] :]
    is_eos = (responses == EOS).int()
    mask = is_eos.cumsum(dim=1) - is_eos == 0  # up to the first EOS. The EOS counts: when to stop is something to learn
    return responses, mask


def distillation_loss(student: PreTrainedModel, teacher: PreTrainedModel, prompts: Tensor) -> Tensor:
    """KL(student ‖ teacher) in nats per token, on answers that the student has just drawn."""
    responses, mask = sample(student, prompts)

    with torch.no_grad():  # the teacher reads the student's answer; it does not write one
        teacher_logits = response_logits(teacher, prompts, responses)[mask]  # [tokens, vocabulary]
    student_logits = response_logits(student, prompts, responses)[mask]  # with gradient

    # Per token, Σ_v p(v) · (log p(v) − log q(v)) over the whole vocabulary: p the student's distribution, q the teacher's. Being
    # exact at every position, it does not depend on which token was drawn there, and so has far less noise than the log-ratio
    # of the drawn token alone. The gradient goes through p and not through the sampling.
    per_token = reverse_kl(to_logp(student_logits), to_logp(teacher_logits))

    # Each token's weight is 1 / (tokens of the whole batch). A batch too large for one pass is cut into pieces that keep this
    # same count, and their losses are summed; a mean of the pieces' means would favour tokens of short answers.
    weights = token_weights(sequence_index=mask.nonzero()[:, 0], lengths=mask.sum(dim=1), global_count=int(mask.sum()))
    return weighted_sum(per_token, weights)


def distil(
    student: PreTrainedModel, teacher: PreTrainedModel, *, steps: int, batch: int, lr: float, warmup: int, seed: int
) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    # Adam's first steps are of full size whatever the gradient's; without a warm-up they can wreck a small model.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
    for step in range(1, steps + 1):
        prompts = torch.tensor([draw(generator)[0] for _ in range(batch)])  # the answers are not used
        loss = distillation_loss(student, teacher, prompts)
        apply_gradient(loss, student, optimizer)
        schedule.step()
        if step == 1 or step == steps or step % 10 == 0:
            print(f"step {step:3d}  reverse KL {loss.item():.4f} nats/token", flush=True)


# ---------------------------------------------------------------------------------------------------------- before and after


def accuracy(model: PreTrainedModel, *, greedy: bool, questions: int = 512) -> float:
    """The share of held-out prompts that are answered without a mistake."""
    generator = random.Random("held out")
    torch.manual_seed(0)
    pairs = [draw(generator) for _ in range(questions)]
    responses, _ = sample(model, torch.tensor([prompt for prompt, _ in pairs]), greedy=greedy)
    return sum(r[: DIGITS + 1] == answer for r, (_, answer) in zip(responses.tolist(), pairs, strict=True)) / questions


def report(name: str, model: PreTrainedModel) -> None:
    """Greedy decoding beside sampling: a student that only became surer of itself would gain in the second alone."""
    sampled, greedy = accuracy(model, greedy=False), accuracy(model, greedy=True)
    print(f"{name:15s} accuracy {sampled:6.1%} sampled, {greedy:6.1%} greedy", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="On-policy distillation on a CPU: sort eight digits.")
    parser.add_argument("--steps", type=int, default=120, help="distillation steps")
    parser.add_argument("--fit-steps", type=int, default=300, help="supervised steps that make teacher and student")
    parser.add_argument("--batch", type=int, default=256, help="prompts per distillation step, one sample each")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the distillation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # models this small only lose time to more threads
    began = time.perf_counter()
    teacher = fit(new_model(args.seed), spoilt=False, steps=args.fit_steps, seed=args.seed + 1)
    student = fit(new_model(args.seed + 2), spoilt=True, steps=args.fit_steps, seed=args.seed + 3)
    print(f"teacher and student fitted in {time.perf_counter() - began:.0f} s", flush=True)
    report("teacher", teacher)
    report("student before", student)
    distil(student, teacher, steps=args.steps, batch=args.batch, lr=args.lr, warmup=3, seed=args.seed + 4)
    report("student after", student)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
