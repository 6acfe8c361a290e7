"""The arguments of every command, as argparse takes them; what several take is in `groups`."""
from __future__ import annotations

import argparse
from pathlib import Path

from p2p.cli import groups


def edit(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("source", nargs="?", help="prompt of the picture to be edited")
    ap.add_argument("targets", nargs="*", metavar="TARGET", help="prompts of the edited pictures")
    groups.picture(ap, "SOURCE")
    ap.add_argument("--inversion", type=Path, metavar="FILE",
                    help="the same, inverted before by p2p invert; SOURCE is left out")
    ap.add_argument("--from", dest="replay", type=Path, metavar="PNG",
                    help="run the edit again that made this picture; options of injection (but "
                    "--emphasis), inversion (but --fit) and sampling that are given change these alone; "
                    "--weight, --cross, --swap and --layers change what they name alone")
    ap.add_argument("--editor", choices=["masactrl", "plug-and-play", "uni-edit"],
                    help="edit in another way than Prompt-to-Prompt, whose "
                    "windows and weights are then refused")
    groups.upscaling(ap)
    ap.add_argument("--upscale-edited", action="store_true", help="inject the source's attention there too")
    ap.add_argument("--proximal", metavar="NORM[:QUANTILE]",
                    help="guide along the largest differences alone: l0, l1, or published "
                    "and published-l1, which compute what ProxEdit's code does (quantile 0.7)")
    ap.add_argument("--report", action="store_true",
                    help="also write report.html: pictures, attention maps, settings, timings")
    ap.add_argument("--preview", action="store_true",
                    help="write preview.png alone: the edit in 10 steps (or --steps), and where a local edit "
                    "may change")
    ap.add_argument("--leakage", action="store_true",
                    help="measure what changed that the edit is not about (always with --scope or --report)")
    groups.inversion(ap)
    groups.injection(ap)
    groups.for_target(ap)
    groups.sampling(ap)


def invert(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("image", type=Path, metavar="PICTURE", help="a picture's file")
    ap.add_argument("source", metavar="PROMPT", help="what it shows")
    groups.inversion(ap)
    groups.sampling(ap)
    groups.hide(ap, "sampler", "tile")


def generate(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", nargs="*", metavar="PROMPT", help="what each picture shows")
    ap.add_argument("--from", dest="replay", type=Path, metavar="PNG",
                    help="make this picture again, and those that were made with it; options of sampling "
                    "that are given change these alone")
    groups.upscaling(ap)
    ap.set_defaults(upscale_edited=False)   # there is no edit
    groups.sampling(ap, seeds=True)


def maps(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("source", metavar="PROMPT", help="of the picture whose maps are shown")
    ap.add_argument("targets", nargs="*", metavar="TARGET",
                    help="edits of it: their maps before and after injection")
    groups.picture(ap, "PROMPT")
    ap.add_argument("--ends", action="store_true", help="also the start and the end token")
    ap.add_argument("--components", action="store_true",
                    help="also the principal components of self-attention")
    ap.add_argument("--arrays", action="store_true", help="also all maps as numbers, maps.npz")
    ap.add_argument("--at", dest="steps_range", metavar="STEP|FIRST:END", help="mean of these steps alone")
    ap.add_argument("--head", type=int, action="append", metavar="N", help="mean of these heads alone")
    ap.add_argument("--site", metavar="NAME", help='layers whose name holds this: "down", "mid", "up"')
    ap.add_argument("--side", type=int,
                    help="maps of this height; default: a quarter of the latents', or the largest")
    ap.add_argument("--max-tokens", type=int,
                    help="record maps of at most so many pixels (1024; of an MM-DiT, any number)")
    groups.inversion(ap)
    groups.injection(ap)
    groups.for_target(ap)
    groups.sampling(ap)


def sweep(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("source", help="prompt of the picture to be edited")
    ap.add_argument("target", help="prompt of the edited pictures")
    ap.add_argument("--over", action="append", required=True, metavar="NAME=VALUE,...",
                    help="cross and self (END or START:END, as --cross and --self say), weight:WORD, layers "
                    "or seed; the first given along the columns, a second along the rows (seeds beside "
                    "another setting always along the rows)")
    groups.picture(ap, "SOURCE")
    groups.inversion(ap)
    groups.injection(ap)
    groups.sampling(ap)


def batch(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("jobs", type=Path, metavar="JOBS", help="a .jsonl file, or one JSON array")
    groups.engine(ap)
    ap.add_argument("--preview", type=int, metavar="N",
                    help="check the list, write OUT/preview.png alone: the first N jobs in 10 steps at "
                    "most, and where local edits may change")
    ap.add_argument("--together", type=int, metavar="N",
                    help="at most so many jobs in one batch of the network (4)")
    ap.add_argument("--editor", choices=["masactrl", "plug-and-play", "uni-edit"], help="as for edit")
    ap.add_argument("--proximal", metavar="NORM[:QUANTILE]", help="as for edit")
    groups.inversion(ap)
    groups.injection(ap)
    groups.model(ap)
    groups.settings(ap, seed="default: 0")
    ap.add_argument("-o", "--out", type=Path, required=True, help="the folder of the results")
    groups.quiet(ap)


def evaluate(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("benchmark", choices=["pie"], help="PIE-Bench")
    ap.add_argument("--data", type=Path, required=True,
                    help="its folder: mapping_file.json and annotation_images/")
    ap.add_argument("-o", "--out", type=Path, required=True,
                    help="the folder of the results; started again, it goes on")
    ap.add_argument("--methods", metavar="NAME,...", help="rows, see above (edit-friendly)")
    ap.add_argument("--editors", metavar="NAME,...",
                    help="of corrected rows: p2p, masactrl, plug-and-play, uni-edit (p2p)")
    ap.add_argument("--ways", type=Path, metavar="FILE.json",
                    help='rows of your own: {"NAME": {settings of a job, as in a list for p2p batch; "like": '
                    "a row to begin with}, ...}")
    ap.add_argument("--pictures", action="append", metavar="NAME=FOLDER",
                    help="a row of finished pictures from another program: KEY.png, or by the names of the "
                    "benchmark's pictures")
    ap.add_argument("--strips", action="store_true",
                    help="... which are strips of panels, as PnPInversion saves them: the last one counts")
    ap.add_argument("--compare", choices=["published"], help="print the published figures beside")
    ap.add_argument("--cross", metavar="END|START:END",
                    help="share of the steps with the source's cross-attention (0.4)")
    ap.add_argument("--self", dest="self_", metavar="END|START:END", help="the same for self-attention (0.6)")
    ap.add_argument("--no-blend", action="store_true", help="edit everywhere, and weigh no word")
    ap.add_argument("--lpips", type=Path, metavar="FILE", help="torchvision's weights of squeezenet1_1")
    ap.add_argument("--clip", type=Path, metavar="FILE", help="open_clip's weights of OpenAI's ViT-L/14")
    ap.add_argument("--dino", type=Path, metavar="FILE",
                    help="timm's weights of vit_base_patch8_224.dino: structure")
    ap.add_argument("--limit", type=int, metavar="N", help="the first N pictures alone")
    ap.add_argument("--types", metavar="ID,...", help="pictures of these editing types alone")
    ap.add_argument("--steps", type=int,
                    help="default 50, or as the row's name says; a published row that is run with other "
                    "settings has them in its name")
    ap.add_argument("--cfg", type=float, help="published: 7.5, or as the row's name says; corrected: the "
                    "model's own")
    ap.add_argument("--seed", type=int, help="published: 1234; corrected: 0")
    groups.engine(ap)
    groups.model(ap)
    groups.quiet(ap)


def dataset(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", type=Path, metavar="PROMPTS", help="a .jsonl file")
    ap.add_argument("--recipe", choices=["ip2p", "p2p"], required=True,
                    help="ip2p: samples and filters as in InstructPix2Pix's generate_img_dataset.py (Euler "
                    "ancestral, only self-attention injected, all samples drawn); p2p: the same filters, but "
                    "pairs by Prompt-to-Prompt, and no more of them once enough have passed")
    ap.add_argument("-o", "--out", type=Path, required=True,
                    help="the folder of the pairs; started again, it goes on")
    ap.add_argument("--clip", type=Path, metavar="FILE",
                    help="open_clip's weights of OpenAI's ViT-L/14, for the filters; the bundled model is "
                    "read by its recogniser")
    ap.add_argument("--preview", type=int, metavar="N",
                    help="write OUT/preview.png alone: one sample of the first N prompts, as the judge finds "
                    "it")
    ap.add_argument("--samples", type=int, help="of a prompt (100); with p2p at most")
    ap.add_argument("--keep", type=int, help="of these (4)")
    ap.add_argument("--steps", type=int, default=100, help="of a sample (100)")
    ap.add_argument("--together", type=int, metavar="N",
                    help="samples in one batch of the network (4)")
    ap.add_argument("--seed", type=int, default=0, help="of the list (0), from which each "
                    "sample's own is made")
    ap.add_argument("--min-image", type=float, metavar="X",
                    help="filter: least similarity of the pictures (0.7; by the "
                    "recogniser, for which another object is a third of a picture, 0.5)")
    ap.add_argument("--min-direction", type=float, default=0.2, metavar="X",
                    help="... of their difference and the captions' (0.2)")
    ap.add_argument("--min-text", type=float, default=0.2, metavar="X",
                    help="... of each picture and its caption (0.2)")
    ap.add_argument("--format", choices=["folders", "webdataset", "parquet"], default="folders",
                    help="written beside the folders")
    groups.model(ap)
    groups.quiet(ap)


def web(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                    help="listen there (127.0.0.1: this machine alone; 0.0.0.0: whoever reaches it)")
    ap.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    ap.add_argument("--share", action="store_true",
                    help="also a link for anybody, through Gradio's servers, for as long as this runs")
    groups.model(ap)


def tokens(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", nargs="+", metavar="PROMPT", help="a source and its targets")
    ap.add_argument("--model", type=Path,
                    help="a folder with T5 (IF, Stable Diffusion 3, FLUX): T5's tokens; else CLIP's")


def encode(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("prompts", nargs="+", metavar="PROMPT", help="all that runs without T5 will name")
    ap.add_argument("--model", required=True, help="the model's folder, T5 in it (text_encoder, tokenizer)")
    ap.add_argument("-o", "--out", type=Path, default=Path("out"),
                    help="folder; every run makes a new one inside (out)")
    groups.device(ap)
    ap.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                    help="that T5 computes in (float32)")


def inspect(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("file", help="a .safetensors or .ckpt file, a diffusers folder, or org/name on the Hub")
    ap.add_argument("--hash", action="store_true", help="also its sha256")
    groups.checkpoint(ap)


def convert(ap: argparse.ArgumentParser) -> None:
    ap.add_argument("file", metavar="IN", help="as for inspect")
    ap.add_argument("out", metavar="OUT", type=Path,
                    help="a .safetensors file, or a new folder in the layout of diffusers")
    ap.add_argument("--half", action="store_true", help="in float16")
    ap.add_argument("--text", type=Path, metavar="FOLDER",
                    help="a model with T5's tokenizer, where a single file with T5 becomes a folder")
    groups.checkpoint(ap)
