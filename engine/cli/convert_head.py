"""`stars convert-head`: the pickled actor of MARA's published code as a safetensors file."""

from __future__ import annotations

import argparse


def convert_head(args: argparse.Namespace) -> int:
    """Runs the command."""
    from stars.model.action_head import convert_action_head

    hidden, width = convert_action_head(args.source, args.target)
    print(f"{args.target}: a head of {width} units over hidden states of {hidden} numbers")
    return 0
