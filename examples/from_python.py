"""Distillation from Python objects: two models, rows and a reward of one's own. A few seconds on a CPU."""

import opd
from opd.testing import digit_tokenizer, tiny_causal_lm

tokenizer = digit_tokenizer()
student, teacher = (tiny_causal_lm(tokenizer, seed=seed, initializer_range=0.2) for seed in (1, 2))
rows = [{"prompt": f"{n}>", "answer": str(n)[::-1]} for n in range(100, 400)]
distiller = opd.Distiller(
    student=(student, tokenizer), teacher=(teacher, tokenizer), prompts=rows[50:], eval_prompts=rows[:50],
    reward=lambda prompt, response: float(response.startswith(prompt.answer)), run_dir="runs/from_python",
    rollout={"max_new_tokens": 8}, train={"steps": 30, "prompts_per_step": 16}, optimizer={"lr": 3e-3},
)  # fmt: skip
run = distiller.train(overwrite=True)
print(*(f"step {r.step}: KL {r.metrics['reverse_kl']:.3f}" for r in run.metrics if r.who == "student"), sep="\n")
