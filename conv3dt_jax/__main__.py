"""``python -m conv3dt_jax``: weights of one framework's file as another's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Converts the weights of 3-D convolutions, transposed or not, between files of Keras, PyTorch and Flax.

  Keras     .keras, .weights.h5, older .h5
  PyTorch   .pt, .pth (weights only), .safetensors
  Flax      .msgpack, .safetensors

Layers keep their names: decoder.up of PyTorch is params["decoder"]["up"] of Flax. The rest of a model (normalization,
dense layers) is left to its framework's own tools. Nothing is written unless all of it fits.
"""
EXAMPLES = """\
examples:
  python -m conv3dt_jax convert unet.keras unet.msgpack
  python -m conv3dt_jax convert unet.pt up.safetensors --to flax --layer decoder.up=up
  python -m conv3dt_jax convert unet.pt trained.keras --template untrained.keras --layer up1=conv3d_transpose
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m conv3dt_jax", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser(
        "convert",
        help="convert weights between Keras, PyTorch and Flax",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("source", metavar="IN", type=Path, help="the file to read")
    one.add_argument("target", metavar="OUT", type=Path, help="the file to write; its ending says for which framework")
    one.add_argument(
        "--layer",
        metavar="NAME[=NEW]",
        action="append",
        default=[],
        help="a layer to convert, and its new name; may be given again; without it all layers are converted",
    )
    one.add_argument(
        "--to", choices=("keras", "pytorch", "flax"), help="for whom OUT is, where it ends in .safetensors"
    )
    one.add_argument(
        "--template", metavar="FILE", type=Path, help="a file of the Keras model that is to get the weights"
    )
    one.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from conv3dt_jax.interop._convert import convert

    pairs = [name.partition("=")[::2] for name in options.layer]
    try:
        written = convert(
            options.source,
            options.target,
            layers=[(old, new or old) for old, new in pairs],
            to=options.to,
            template=options.template,
            overwrite=options.overwrite,
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    for new, (old, arrays) in written.items():
        shapes = ", ".join(f"{part} {array.shape} {array.dtype}" for part, array in arrays.items())
        print(f"{old or '(the layer)'} -> {new or '(the layer)'}: {shapes}")
    print(f"{len(written)} {'layer' if len(written) == 1 else 'layers'} of {options.source} in {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
