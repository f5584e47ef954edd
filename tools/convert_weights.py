#!/usr/bin/env python3
"""Convert a checkpoint of the authors or of ours; the input's format is recognised.

    python tools/convert_weights.py IN OUT --to official|ours|detectron2|safetensors

OUT is for the authors' code, for ours, for Detectron2's own DetectionCheckpointer, or safetensors.
Only complete models are converted; for the backbone of one:

    python tools/convert_weights.py spatialmamba_tiny.pth backbone.pth --to detectron2 \
        --only backbone
"""

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.models.checkpoints.convert import FORMATS, PARTS, convert_weights

    parser = build_parser(__doc__)
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--only", choices=PARTS, help="leave out all other parts")
    parser.add_argument("--sha256", help="that IN must have, 64 hexadecimal digits")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()
    contents = convert_weights(
        args.source,
        args.target,
        args.to,
        only=args.only,
        sha256=args.sha256,
        overwrite=args.overwrite,
    )
    print(f"{args.target}: {contents}")


if __name__ == "__main__":
    run_tool(main)
