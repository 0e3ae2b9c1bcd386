"""The peer of alignment_step.py: a step of Hugging Face's TRL, DPO or GRPO; prints one JSON line.

The trainers are TRL's own, on a bfloat16 Llama of random weights with PEFT's adapters, at the
shapes of llama_1b_dpo.gin and llama_1b_grpo.gin; the base is frozen and the reference. A callback
waits for the GPU and reads the clock around each step. GRPO writes by transformers' `generate`,
whose time is also told apart; TRL can write by vLLM instead, which is another program. Now and then
an answer ends early, as the end is one of all tokens. The first steps warm up and are not counted.

python experiments/bench/trl_step.py grpo --cache static
"""

# Beside torch, transformers, accelerate, peft, pandas, pyarrow and xxhash it needs these, all pure
# Python, installed without what they depend on, and not from within their wheels:
# trl==1.16.0
# datasets==5.2.0
# multiprocess==0.70.19
# dill==0.4.1

import argparse
import json
import statistics
import tempfile
import time

import datasets
import numpy as np
import peft
import tokenizers
import torch
import transformers
import trl
from huggingface_step import LLAMA

END = "end"


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loss", choices=("dpo", "grpo"))
    parser.add_argument("--rows", type=int, help="pairs, or answers, of a step; 8 or 256")
    parser.add_argument("--prompt", type=int, help="tokens; 512 or 128")
    parser.add_argument("--answer", type=int, help="tokens; 512 or 256")
    parser.add_argument("--microbatches", type=int, help="of a step; 1 or 8")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile, as TRL offers it")
    parser.add_argument("--cache", default="dynamic", help='of keys and values; or "static"')
    parser.add_argument("--tiny", action="store_true", help="two narrow layers on a CPU")
    options = parser.parse_args()
    sizes = dict(dpo=(8, 512, 512, 1), grpo=(256, 128, 256, 8))[options.loss]
    for name, size in zip(("rows", "prompt", "answer", "microbatches"), sizes, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, size)
    return options


def make_model(options):
    """A Llama of random weights."""
    tiny = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512)
    shape = LLAMA | dict(use_cache=True) | (tiny if options.tiny else {})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if options.tiny else "cuda"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    torch.set_default_dtype(torch.float32)
    return model


def make_tokenizer(vocab_size):
    """A word for each token of the model: its number; the first one ends and fills up."""
    words = {END: 0} | {str(number): number for number in range(1, vocab_size)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=END))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END, pad_token=END, padding_side="left"
    )


def random_texts(num_texts, num_tokens, vocab_size, seed):
    """Texts of so many random tokens."""
    tokens = np.random.default_rng(seed).integers(1, vocab_size, (num_texts, num_tokens))
    return [" ".join(map(str, text)) for text in tokens.tolist()]


def now():
    """The clock, when the GPU has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(transformers.TrainerCallback):
    """Seconds of each step, and of the writing in it."""

    def __init__(self):
        self.steps, self.writes, self.written, self.losses = [], [], [], []

    def on_step_begin(self, args, state, control, **others):
        """A step begins, of GRPO with its writing."""
        self.began = now()

    def on_step_end(self, args, state, control, **others):
        """A step has ended."""
        self.steps.append(now() - self.began)

    def on_log(self, args, state, control, logs=None, **others):
        """Keeps the loss."""
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def around(self, write):
        """The function with its time taken."""

        def timed(*arguments, **settings):
            began = now()
            answers, *others = write(*arguments, **settings)
            self.writes.append(now() - began)
            self.written.append(sum(map(len, answers)))
            return answers, *others

        return timed


def shared_settings(options, folder):
    """What both trainers are told."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=options.rows // options.microbatches,
        gradient_accumulation_steps=options.microbatches,
        max_steps=options.warmup + options.steps,
        learning_rate=1e-6,
        bf16=True,
        use_cpu=options.tiny,
        gradient_checkpointing=False,
        torch_compile=options.compile,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )


def make_trainer(options, model, folder):
    """TRL's trainer of the loss."""
    vocab_size, num = model.config.vocab_size, options.rows * 2
    prompts = random_texts(num, options.prompt, vocab_size, 0)
    shared = dict(
        model=model,
        processing_class=make_tokenizer(vocab_size),
        peft_config=peft.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    settings = shared_settings(options, folder)
    if options.loss == "dpo":
        length = options.answer - 1  # TRL appends the end
        answers = [random_texts(num, length, vocab_size, seed) for seed in (1, 2)]
        chosen, rejected = ([f" {text}" for text in texts] for texts in answers)
        rows = dict(prompt=prompts, chosen=chosen, rejected=rejected)
        config = trl.DPOConfig(beta=0.1, max_length=None, **settings)
        data = datasets.Dataset.from_dict(rows)
        return trl.DPOTrainer(args=config, train_dataset=data, **shared)
    config = trl.GRPOConfig(
        beta=0.04,
        num_generations=8,
        max_completion_length=options.answer,
        cache_implementation=None if options.cache == "dynamic" else options.cache,
        **settings,
    )
    data = datasets.Dataset.from_dict(dict(prompt=prompts))
    return trl.GRPOTrainer(args=config, train_dataset=data, reward_funcs=even_share, **shared)


def even_share(completion_ids, **others):
    """The reward of each answer: the share of its tokens that are even."""
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]


def main():
    """Train, and print the medians of the steps after the first."""
    options = parse_arguments()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, make_model(options), folder)
        trainer.add_callback(clock)
        trainer.remove_callback(transformers.PrinterCallback)
        if options.loss == "grpo":
            trainer._generate_single_turn = clock.around(trainer._generate_single_turn)
        trainer.train()
    seconds = statistics.median(clock.steps[options.warmup :])
    figures = {"peer": f"trl {trl.__version__} {options.loss}", "compile": options.compile}
    figures |= {"step_ms": seconds * 1e3, "loss": clock.losses[-1]}
    num_texts = options.rows * (2 if options.loss == "dpo" else 1)
    learn_s = seconds
    if options.loss == "grpo":
        write_s = statistics.median(clock.writes[options.warmup :])
        learn_s = seconds - write_s
        figures |= {"cache": options.cache, "write_ms": write_s * 1e3}
        figures["written_per_second"] = clock.written[-1] / write_s
    figures["update_ms"] = learn_s * 1e3  # with the reference's forward, and GRPO's rewards
    figures["trained_per_second"] = num_texts * (options.prompt + options.answer) / learn_s
    figures["adapters"] = str(next(w.dtype for w in trainer.model.parameters() if w.requires_grad))
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
