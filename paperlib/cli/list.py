"""Profiles, notebooks and parameters, with their meaning."""

import argparse

from paperlib.experiment import settings
from paperlib.notebooks import notebook_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def execute(options: argparse.Namespace) -> int:
    print("profiles:")
    for name in settings.profiles():
        print(f"  {name:14} {settings.headline(name)}")
    print("\nnotebooks:")
    for path in notebook_files():
        print(f"  {path.stem}")
    print("\nparameters (--set NAME=VALUE):")
    for name, field in settings.Settings.model_fields.items():
        print(f"  {name:22} {field.description}")
    return 0
