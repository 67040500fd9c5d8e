"""Write the prompts of two teachers: grade-school mathematics and short Python tasks.

`python recipes/two-teachers/prepare.py DIR` makes DIR/train.jsonl, where each row names its teacher, and DIR/eval.jsonl, whose rows have
numbers as answers. It needs `pip install 'opd[datasets]'` and the hub.
"""

import json
import random
import sys
from pathlib import Path

MATH, CODE = "openai/gsm8k", "iamtarun/python_code_instructions_18k_alpaca"
ASK_MATH = "{question}\nReason step by step. End with a line that holds #### and the number."
ASK_CODE = "{instruction}\n{input}\nAnswer with Python code."
SEED = 0


def chat(text: str, **columns: str) -> dict[str, object]:
    """One row: a message of the user, and other columns."""
    return {"prompt": [{"role": "user", "content": text.strip()}], **columns}


def main(folder: Path) -> None:
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    math = load_dataset(MATH, "main")
    train = [chat(ASK_MATH.format(**row), answer=row["answer"], teacher="math") for row in math["train"]]
    code = load_dataset(CODE, split="train").shuffle(seed=SEED).select(range(len(train)))
    train += [chat(ASK_CODE.format(**row), teacher="code") for row in code]
    random.Random(SEED).shuffle(train)
    held_out = [chat(ASK_MATH.format(**row), answer=row["answer"], teacher="math") for row in math["test"]]
    for name, rows in (("train", train), ("eval", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Name a folder for the prompts: python recipes/two-teachers/prepare.py two_teachers")
    main(Path(sys.argv[1]))
