"""Train the demonstration pair: a small language model (LM) of film reviews and a reward model (RM) which scores them.

    python benchmarks/train_pair.py lm --data IMDB --out PAIR [--init LM_DIRECTORY] [--minutes 50]
    python benchmarks/train_pair.py rm --data IMDB --out PAIR [--init RM_DIRECTORY] [--minutes 25]
    python benchmarks/train_pair.py small --data IMDB --out PAIR [--init SMALL_DIRECTORY] [--minutes 15]

IMDB is a folder with `unsup.jsonl.xz` and `train.jsonl.xz` (Large Movie Review Dataset, Maas et al., ACL 2011; one JSON
object per line with `text` and `stars`). `lm` writes PAIR/lm; `rm` starts from PAIR/lm, or goes on from an RM, and
writes PAIR/rm. `small` teaches an LM of a fifth of the size what PAIR/lm would say next (one that drafts for it), and
writes PAIR/small. All are Hugging Face directories in bfloat16. Each run puts its own section into the results file.

Budgets are minutes of training, and the learning rate follows the fraction of the budget which is spent. A machine that
is slow, shared or paused for a while thus gives fewer tokens, never a schedule cut off in its middle.

The last 1,000 reviews of each label in `train.jsonl.xz` are held out from both models. The file lists reviews of one
film next to each other, so a block at the end shares hardly a film with the rest; a random choice would share most.
"""

import argparse
import collections
import datetime
import functools
import json
import lzma
import math
import os
import pathlib
import platform
import random
import re
import shlex
import sys
import time

# Threads sleep while they wait for each other. On two busy cores, spinning burnt most of the time which they got: 200
# tokens per second against 600. The runtime reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tokenizers
import torch
import torch.nn.functional as F
import transformers

VOCABULARY, CONTEXT = 8192, 256  # CONTEXT: tokens per training row, and the most that the reward model learns to score
PAD, BOS, EOS = range(3)  # ids of <pad>, <s>, </s>
SHORTEST_PREFIX = 12  # tokens; a shorter text says too little to be scored
HELD_OUT_PER_LABEL = 1000  # reviews
LONGEST_STEP = 10.0  # seconds; what a step takes beyond this is a pause (a stopped process), not training
WARM_UP = 0.02  # fraction of the budget


# ---------------------------------------------------------------- data


def clean(text: str) -> str:
    """The review without its HTML line breaks: each run of them becomes one newline, other white space one space."""
    lines = re.split(r"(?:\s*<br\s*/?>\s*)+|\s*\n\s*", text)
    return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def read_reviews(path: pathlib.Path) -> list[dict]:
    """All rows of an xz-compressed JSON-lines file, texts cleaned."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        row["text"] = clean(row["text"])
    return rows


def labelled_reviews(data: pathlib.Path) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(training, held-out) reviews as (text, label), label 1.0 for more than 5 stars and 0.0 otherwise."""
    training, held_out = [], []
    rows = read_reviews(data / "train.jsonl.xz")
    for label in (0.0, 1.0):
        reviews = [(row["text"], label) for row in rows if float(row["stars"] > 5) == label]
        training += reviews[:-HELD_OUT_PER_LABEL]
        held_out += reviews[-HELD_OUT_PER_LABEL:]
    return training, held_out


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens whose encoding starts with <s>."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def packed_rows(texts: list[str], tokenizer, chance: random.Random, batch: int):
    """Without end: int64 [batch, CONTEXT + 1], cut from documents `<s> text </s>` in random order, end to end.

    A row's last token is the first of the row which follows it in the text, so that every token is predicted once.
    Encodes some hundred documents at a time and shuffles their rows, so that a batch holds different documents.
    """
    while True:
        chance.shuffle(texts)
        for start in range(0, len(texts), 256):
            stream = [token for ids in tokenizer(texts[start : start + 256]).input_ids for token in (*ids, EOS)]
            rows = torch.tensor(stream).unfold(0, CONTEXT + 1, CONTEXT)
            order = chance.sample(range(len(rows)), len(rows))
            for at in range(0, len(rows) - batch + 1, batch):
                yield rows[order[at : at + batch]]


def window(text: str, chance: random.Random) -> str:
    """A text to score: from the review's start (most often, as requests do) or from the start of a random sentence."""
    starts = [match.end() for match in re.finditer(r"[.!?][\"')]*\s+|\n", text)]
    starts = [start for start in starts if len(text) - start > 100]  # characters; leaves enough to be judged
    return text[chance.choice(starts) :] if starts and chance.random() < 0.3 else text


def pad(rows: list[list[int]], width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [rows, width or longest], lengths int64 [rows]); pads at the right, where no token attends to them."""
    lengths = torch.tensor([len(row) for row in rows])
    width = width or int(lengths.max())
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows]), lengths


# ---------------------------------------------------------------- training


def new_language_model() -> transformers.LlamaForCausalLM:
    """6.5 M parameters, random weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Budget:
    """Seconds of training, counted step by step; a step longer than LONGEST_STEP counts as LONGEST_STEP."""

    def __init__(self, minutes: float):
        self.total, self.spent, self.steps = 60 * minutes, 0.0, 0
        self.last = time.monotonic()
        self.processor = time.process_time()

    def step(self) -> None:
        now = time.monotonic()
        self.spent += min(now - self.last, LONGEST_STEP)
        self.last, self.steps = now, self.steps + 1

    def rate(self) -> float:
        """The factor of the peak learning rate: linear warm-up, then a cosine to zero."""
        fraction = self.spent / self.total
        return min(fraction / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))

    def facts(self) -> dict:
        processor = (time.process_time() - self.processor) / 60
        return {"steps": self.steps, "minutes": round(self.spent / 60, 1), "processor_minutes": round(processor, 1)}


bfloat16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def language_loss(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats per token of predicting rows[:, 1:] (ids, [batch, length + 1]); pads are not predicted."""
    with bfloat16():
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state  # [batch, length, hidden]
        logits = model.lm_head(hidden)  # [batch, length, vocabulary]
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), ignore_index=PAD)


def scores(model, ids: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Scores of all prefixes at once, float32 [batch, length]: entry [b, t] is the logit of ids[b, : t + 1]."""
    with bfloat16():
        embedded = F.dropout(model.model.embed_tokens(ids), dropout, model.training)
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state  # [batch, length, hidden]
        return model.score(F.dropout(hidden, dropout, model.training)).squeeze(-1).float()


def reward_loss(model, ids: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy over every prefix from SHORTEST_PREFIX tokens to the whole row, which has a third of the
    weight. One pass thus trains on up to 245 prefixes of a review. Smoothed labels keep the logit within about -4..4.
    """
    logits = scores(model, ids, dropout=0.1)
    targets = (0.03 + 0.94 * labels)[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # [batch, length]
    places = torch.arange(1, ids.shape[1] + 1)[None, :]  # the length of the prefix which each place ends
    prefixes = ((places >= SHORTEST_PREFIX) & (places <= lengths[:, None])).float()
    last = (places == lengths[:, None]).float()
    return (losses * prefixes).sum() / prefixes.sum() * 2 / 3 + (losses * last).sum() / len(ids) / 3


@torch.no_grad()
def evaluate_language(model, tokenizer, texts: list[str]) -> float:
    """Mean loss in nats per token of `<s> text </s>`, up to 2 * CONTEXT tokens of each text."""
    model.eval()
    rows = sorted(((ids + [EOS])[: 2 * CONTEXT + 1] for ids in tokenizer(texts).input_ids), key=len)
    total = count = 0
    for start in range(0, len(rows), 16):
        ids, lengths = pad(rows[start : start + 16])
        tokens = int(lengths.sum()) - len(lengths)
        total, count = total + language_loss(model, ids).item() * tokens, count + tokens
    return round(total / count, 4)


@torch.no_grad()
def evaluate_reward(model, tokenizer, reviews: list[tuple[str, float]], seed: int = 0) -> dict:
    """Accuracy (score > 0 means positive) on whole reviews (first CONTEXT tokens), on one prefix of each review with a
    random length (SHORTEST_PREFIX to CONTEXT) and on prefixes of given lengths; quantiles of the whole reviews' scores.
    """
    model.eval()
    chance = random.Random(seed)
    correct, whole = collections.defaultdict(list), []
    rows = [ids[:CONTEXT] for ids in tokenizer([text for text, _ in reviews]).input_ids]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        table = scores(model, pad([rows[index] for index in chosen])[0])
        for index, line in zip(chosen, table.tolist()):
            longest = len(rows[index])
            lengths = {"whole": longest, "prefix": chance.randint(min(SHORTEST_PREFIX, longest), longest)}
            lengths |= {f"prefix_{length}": min(length, longest) for length in (16, 32, 64, 128)}
            for name, length in lengths.items():
                correct[name].append((line[length - 1] > 0) == (reviews[index][1] > 0.5))
            whole.append(line[longest - 1])
    whole.sort()
    quantiles = {f"{q}%": round(whole[int(len(whole) * q / 100)], 2) for q in (1, 5, 25, 50, 75, 95, 99)}
    accuracies = {name: round(sum(hits) / len(hits), 4) for name, hits in correct.items()}
    return {"accuracy": accuracies, "score_quantiles": quantiles}


def fit(model, loss_of, batches, minutes: float, rate: float) -> dict:
    """Train `model` on `batches`, each (tokens which count, arguments of `loss_of` after the model)."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    compiled = torch.compile(loss_of)
    model.train()
    compiled(model, *next(batches)[1]).backward()  # compiles, outside of the budget
    model.zero_grad()
    budget, average, total = Budget(minutes), None, 0
    while budget.spent < budget.total:
        tokens, arguments = next(batches)
        loss = compiled(model, *arguments)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * budget.rate()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
        total += tokens
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if budget.steps % 50 == 0:
            print(f"{budget.spent:.0f} s, step {budget.steps}, training loss {average:.3f}", flush=True)
    return {"training_tokens": total} | budget.facts() | {"training_loss": round(average, 4)}


def train_language_model(options) -> dict:
    texts = [row["text"] for row in read_reviews(options.data / "unsup.jsonl.xz")]
    held_out = [text for text, _ in labelled_reviews(options.data)[1]][::8]  # 250 reviews
    if options.init:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.init)
        model = transformers.LlamaForCausalLM.from_pretrained(options.init, dtype=torch.float32)
    else:
        tokenizer, model = train_tokenizer(texts), new_language_model()
    facts = {"started_from": "an earlier model of the same shape" if options.init else "random weights"}
    facts |= {"loss_unit": "nats per token", "held_out_reviews": len(held_out)}
    facts |= {"held_out_loss_before": evaluate_language(model, tokenizer, held_out)}
    print(facts, flush=True)
    rows = packed_rows(texts, tokenizer, random.Random(options.seed), options.batch)
    batches = ((options.batch * CONTEXT, (row,)) for row in rows)
    facts |= fit(model, language_loss, batches, options.minutes, options.rate)
    model = model.to(torch.bfloat16)  # what ships is what is measured
    facts |= {"held_out_loss": evaluate_language(model, tokenizer, held_out)}
    model.generation_config = transformers.GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    save(model, tokenizer, options.out / "lm")
    return facts


def new_small_model(teacher: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """1.4 M parameters, of which 1.05 M are the table of tokens, input and output in one: the best approximation of the
    teacher's table in as many dimensions. The layers are random."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=2, head_dim=64,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=teacher.config.max_position_embeddings,
        tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    table = teacher.get_input_embeddings().weight.data  # [vocabulary, 256]
    directions = torch.linalg.svd(table, full_matrices=False).Vh[: config.hidden_size]  # [128, 256]
    model.get_input_embeddings().weight.data.copy_(table @ directions.T)
    return model


def train_small_model(options) -> dict:
    texts = [row["text"] for row in read_reviews(options.data / "unsup.jsonl.xz")]
    held_out = [text for text, _ in labelled_reviews(options.data)[1]][::8]  # 250 reviews
    source = options.out / "lm"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    teacher = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if options.init:
        model = transformers.LlamaForCausalLM.from_pretrained(options.init, dtype=torch.float32)
    else:
        model = new_small_model(teacher)

    def distillation_loss(model, rows: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """Mean KL divergence from teacher to student, in nats per token, of rows [batch, length + 1]; taught: the
        teacher's hidden states [batch, length, 256]."""
        with bfloat16():
            told = teacher.lm_head(taught).float().log_softmax(-1)  # [batch, length, vocabulary]
            hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            said = model.lm_head(hidden).float().log_softmax(-1)
        return F.kl_div(said.flatten(0, 1), told.flatten(0, 1), reduction="batchmean", log_target=True)

    def batches():
        for rows in packed_rows(texts, tokenizer, random.Random(options.seed), options.batch):
            with torch.no_grad(), bfloat16():
                taught = teacher.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            yield options.batch * CONTEXT, (rows, taught)

    teacher.requires_grad_(False)
    facts = {"started_from": "an earlier small model" if options.init else "the language model's table of tokens",
             "loss_unit": "nats per token", "held_out_reviews": len(held_out),
             "parameters": sum(weight.numel() for weight in model.parameters()),
             "held_out_loss_of_the_language_model": evaluate_language(teacher, tokenizer, held_out)}
    print(facts, flush=True)
    facts |= fit(model, distillation_loss, batches(), options.minutes, options.rate)
    facts["training_loss_is"] = "the divergence from what the language model says"
    model = model.to(torch.bfloat16)
    facts |= {"held_out_loss": evaluate_language(model, tokenizer, held_out)}
    model.generation_config = transformers.GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    save(model, tokenizer, options.out / "small")
    return facts


def train_reward_model(options) -> dict:
    chance = random.Random(options.seed)
    training, held_out = labelled_reviews(options.data)
    source = options.init or options.out / "lm"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.LlamaForSequenceClassification.from_pretrained(source, dtype=torch.float32, num_labels=1)
    if options.layers:  # sentiment needs less depth than text does, and a shallow scorer trains and serves faster
        del model.model.layers[options.layers :]
        model.config.num_hidden_layers = options.layers
    if not options.init:
        torch.nn.init.zeros_(model.score.weight)  # all scores start at zero, whatever the body says

    def batches():
        while True:
            chance.shuffle(training)
            for start in range(0, len(training) - options.batch + 1, options.batch):
                texts, labels = zip(*training[start : start + options.batch])
                encoded = tokenizer([window(text, chance) for text in texts]).input_ids
                ids, lengths = pad([row[:CONTEXT] for row in encoded], CONTEXT)  # one shape: one compilation
                yield int(lengths.sum()), (ids, lengths, torch.tensor(labels))

    facts = {"started_from": "an earlier reward model" if options.init else "the language model's body"}
    facts |= fit(model, reward_loss, batches(), options.minutes, options.rate)
    facts["passes"] = round(facts["steps"] * options.batch / len(training), 2)
    model = model.to(torch.bfloat16)
    save(model, tokenizer, options.out / "rm")
    return facts | {"held_out_reviews": len(held_out)} | evaluate_reward(model, tokenizer, held_out)


# ---------------------------------------------------------------- files


def save(model, tokenizer, directory: pathlib.Path) -> None:
    """Write a Hugging Face directory which anybody may read."""
    for key in ("is_local", "local_files_only"):  # how the tokenizer was found here; of no use elsewhere
        tokenizer.init_kwargs.pop(key, None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)


def record(options, facts: dict) -> None:
    """Put `facts` and where they came from into the model's section of the results file."""
    arguments = [pathlib.Path(word).name if word.startswith(("/", ".")) else word for word in sys.argv[1:]]
    models = re.findall(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
    origin = {
        "command": shlex.join(["python", "benchmarks/train_pair.py", *arguments]),  # folders by their last name only
        "date": datetime.date.today().isoformat(),
        "processor": models[0] if models else platform.processor(),
        "batch_rows": options.batch,
        "peak_learning_rate": options.rate,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = options.results
    results = json.loads(path.read_text()) if path.exists() else {}
    results[options.model] = origin | facts
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["lm", "rm", "small"])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the reviews")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the models, lm/, rm/ and small/")
    parser.add_argument("--init", type=pathlib.Path, help="start from this model (with the same held-out reviews)")
    parser.add_argument("--layers", type=int, help="rm only: keep this many of the language model's layers")
    parser.add_argument("--minutes", type=float, default=50.0, help="training time, pauses not counted")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--rate", type=float, default=7e-4, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("benchmarks/results/train_pair.json"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    facts = {"lm": train_language_model, "rm": train_reward_model, "small": train_small_model}[options.model](options)
    record(options, facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
