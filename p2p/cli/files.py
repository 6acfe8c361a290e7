"""The commands about prompts and files, given their parsed arguments: tokens, encode, inspect, convert."""
from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

import p2p
from p2p import align
from p2p.cli import options, values
from p2p.cli.output import Output
from p2p.edits import choose_mode
from p2p.models.t5 import EncodedPrompts
from p2p.models.t5 import tokens as t5_tokens
from p2p.models.text import Tokens, tokenizer, tokens
from p2p.request import add_ons
from p2p.request.emphasis import read
from p2p.request.prompts import check as check_prompt
from p2p.weights import t5
from p2p.weights.convert import convert as run_convert
from p2p.weights.detect import FLOWS
from p2p.weights.inspect import report as describe
from p2p.weights.load import find
from p2p.weights.t5 import save_prompts
from p2p.weights.texts import flow_family, load_t5
from p2p.weights.untrusted import printable


def _read_by_t5(model: Path | None) -> Path | None:
    """Where the T5 lies, or should, that reads a model's prompts; None: CLIP reads them."""
    if model is None or t5.in_folder(model) is not None:
        return model
    package = find(model)
    return package.where if package.family in (*FLOWS, "if") else None


def show_tokens(args: argparse.Namespace) -> None:
    if (folder := _read_by_t5(args.model)) is None:
        named = tokenizer()
        split = [tokens(read(p).text) for p in args.prompts]
    else:
        named, family = t5.tokenizer_in(folder), flow_family(folder)
        texts = [read(p).text if family == "sd3" else p for p in args.prompts]
        split = [t5_tokens(named, text, masked=family is None) for text in texts]
    for t in split:
        print(t.text)
        for i, (token, (start, end)) in enumerate(zip(t.ids, t.spans)):
            word = named.decode([token]).strip()
            print(f"  {i:3}  {token:5}  {word:20} {t.text[start:end]}".rstrip())
    for target in split[1:]:
        mode = choose_mode(split[0], p2p.Edit(target.text), target)
        print(f"{target.text!r} from {split[0].text!r} (mode {mode}): token of the target <- of the source")
        for j, partners in enumerate(_partners(split[0], target, mode)):
            print(f"  {j:3} <- {', '.join(map(str, partners)) or 'new'}")


def _partners(source: Tokens, target: Tokens, mode: str) -> list[list[int]]:
    """Of each token of the target, the source's tokens whose maps it takes in an edit of this mode."""
    length = max(77, len(source.ids), len(target.ids))
    if mode == "replace":
        m = align.replacement(source, target, length)
        return [m[:, j].nonzero().flatten().tolist() for j in range(len(target.ids))]
    mapper, a = align.refinement(source, target, length)
    return [[int(mapper[j])] if a[j] else [] for j in range(len(target.ids))]


def encode(args: argparse.Namespace) -> None:
    out = Output(args.out, args.prompts[0])
    weighs = flow_family(Path(args.model)) == "sd3"   # it reads brackets as weights, by its CLIP towers
    for prompt in args.prompts:
        options.say(check_prompt(prompt))
        if not weighs and not read(prompt).plain:
            options.say([f'"{prompt}": brackets are text to T5, and weigh nothing'])
    tower = load_t5(Path(args.model), options.device(args), getattr(torch, args.dtype))
    texts = [read(prompt).text for prompt in args.prompts] if weighs else args.prompts
    encoded = EncodedPrompts.encoded_by(tower, texts)
    if not encoded.embeddings.isfinite().all():
        raise p2p.NumericsError(f"{args.model}: T5 gives values that are not finite in {args.dtype}")
    out.add("prompts.safetensors", partial(save_prompts, encoded))
    out.write()


def inspect(args: argparse.Namespace) -> None:
    lines = describe(args.file, args.family, args.prediction, args.vae, args.hash, ema=args.ema,
                     zero_snr=args.zero_snr, lora=add_ons.loras(values.loras(args)))
    print("\n".join(map(printable, lines)))


def convert(args: argparse.Namespace) -> None:
    package = find(args.file, args.family, args.prediction, args.vae, args.ema, zero_snr=args.zero_snr,
                   lora=add_ons.loras(values.loras(args)))
    run_convert(package, args.out, args.half, args.text)
    print(args.out)
