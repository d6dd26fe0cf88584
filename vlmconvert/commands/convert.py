"""`vlmconvert convert CHECKPOINT`, and a command such as `vlmconvert mllama` for every family."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click

from vlmconvert.commands import check_new_file, machine_options, refuse_options
from vlmconvert.families import FAMILIES, demo_checkpoint
from vlmconvert.options import Option
from vlmconvert.precisions import precision_names, precision_options
from vlmconvert.targets import TARGETS, load_target

__all__ = ["conversion_command"]

_CALIBRATION = ("calibration", "samples", "vision_samples", "sequence_length", "seed")


def conversion_command(name: str, family: str | None = None) -> click.Command:
    """Make a command that converts checkpoints.

    Args:
        name: name of the command.
        family: family whose checkpoints the command converts; None takes checkpoints of any family.
    """
    kind = f"a {family} checkpoint" if family else "a checkpoint of any family"
    return _ConversionCommand(
        name=name,
        callback=partial(_convert, family),
        params=[click.Argument(["checkpoint"], required=family is None)],
        help=f"Convert {kind} to an artifact for {', '.join(TARGETS.names)}.",
    )


class _ConversionCommand(click.Command):
    """A command whose options are made when it is used, because they load the targets and precisions of installed packages."""

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        if len(self.params) == 1:
            self.params += _options()
        return super().get_params(context)

    def format_help_text(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        self.help = f"{self.help}\n\n{_usage(str(self.name))}"
        super().format_help_text(context, formatter)


def _usage(name: str) -> str:
    """The part of a command's help that follows the first sentence."""
    has_demo = name in FAMILIES and demo_checkpoint(name) is not None
    without = "; if it is left out, the embedded demo checkpoint is converted" if has_demo else ""
    example = "" if has_demo else "./checkpoint "
    return f"""CHECKPOINT is a local folder or a Hugging Face Hub id{without}.

\b
Examples:
  vlmconvert {name} {example}--llm int4-awq --vision int8-ptq
  vlmconvert {name} ./checkpoint --llm fp16 --vision fp16 -o out --no-validate
  vlmconvert {name} ./checkpoint --calibration ./photos --samples 32 --dry-run
  vlmconvert {name} ./checkpoint --max-size 4.5GB --save-recipe recipe.toml
  vlmconvert {name} ./checkpoint --target ascend --llm w8a16
  vlmconvert {name} ./checkpoint --max-memory 8GiB
  vlmconvert {name} ./checkpoint --recipe recipe.toml
"""


def _options() -> list[click.Parameter]:
    """All options of a conversion, in the order in which --help shows them."""
    choice = click.Choice
    folder = click.Path(path_type=Path)
    file = click.Path(path_type=Path, dir_okay=False)
    defaults = {target: load_target(target).precisions for target in TARGETS.names}

    def usual(side: str) -> str:
        return ", ".join(dict.fromkeys(f"{own[side]} for {name}" for name, own in defaults.items() if side in own))

    return [
        click.Option(["-o", "--output"], type=folder, help="Folder to write.  [default: named after checkpoint, target and precisions]"),
        click.Option(["--target"],
            type=choice(TARGETS.names),
            default="openvino",
            show_default=True,
            help="Runtime that the artifact is made for: "
            + "; ".join(f"{name} for {load_target(name).summary}" for name in TARGETS.names)
            + ".",
        ),
        click.Option(["--llm"], type=choice(precision_names("language")), help=f"Precision of the language model.  [default: {usual('language')}]"
        ),
        click.Option(["--vision"], type=choice(precision_names("vision")), help=f"Precision of the vision encoder.  [default: {usual('vision')}]"
        ),
        click.Option(["--max-size"], metavar="SIZE", help="Maximum size of the component files, such as 4.5GB, or of each weight, such as 4.5bits: each layer of a side without a precision gets 4 bit, 8 bit or float by what it loses."
        ),
        *map(_click_option, precision_options()),
        click.Option(["--recipe"],
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Run the passes of this recipe file, in place of --target, --llm, --vision and their options.",
        ),
        click.Option(["--save-recipe"], type=file, help="Write the options as a recipe to this file; also with --dry-run."),
        click.Option(["--samples"], default=64, show_default=True, help="int4-awq, int4-gptq: number of calibration samples, 0 for none."),
        click.Option(["--sequence-length"], default=0, show_default=True, help="int4-awq, int4-gptq: maximum number of tokens of a sample, 0 for no limit."
        ),
        click.Option(["--vision-samples"], default=100, show_default=True, help="int8-ptq: number of calibration samples."),
        click.Option(["--calibration"],
            default="mixed",
            show_default=True,
            help="Source of calibration samples: mixed (photos, texts and drawn images), scenes (drawn images alone), a folder, COCO or VQAv2 JSON, TSV, or a datasets id[:split].",
        ),
        click.Option(["--seed"], default=0, show_default=True, help="Seed that selects the calibration samples."),
        *map(_click_option, _target_options()),
        click.Option(["--revision"], help="Branch, tag or commit of a hub id."),
        click.Option(["--token"], envvar="HF_TOKEN", help="Access token for a gated hub id."),
        click.Option(["--ignore-unused"], is_flag=True, help="Leave out adapters and other tensors that the model of the config does not have."
        ),
        *machine_options(),
        click.Option(["--store"], type=folder, help="Folder where finished steps are kept.  [default: ~/.cache/vlmconvert]"),
        click.Option(["--force"], is_flag=True, help="Replace a different artifact of vlmconvert at the output."),
        click.Option(["--dry-run"], is_flag=True, help="Stop after the plan."),
        click.Option(["--validate/--no-validate"], default=True, show_default=True, help="Compare the artifact with the checkpoint."
        ),
        click.Option(["--validation-samples"],
            default=200,
            show_default=True,
            help="Maximum number of held-out scenes for that comparison.",
        ),
        click.Option(["--validation-time"],
            default=0.25,
            show_default=True,
            help="Maximum share of the conversion's time that it takes, once it has taken a minute; 0 sets no limit.",
        ),
        click.Option(["--max-kl"], type=float, help="Maximum mean KL divergence from the checkpoint that passes, in nats.  [default: that of the precisions, which the plan shows]"),
        click.Option(["--max-drop"], default=1.0, show_default=True, help="Maximum loss of accuracy that passes, in percentage points."
        ),
    ]  # fmt: skip


def _target_options() -> Iterable[Option]:
    """The options of all targets, each of them once; the help of an option begins with the targets that have it."""
    owners: dict[str, list[str]] = {}
    options: dict[str, Option] = {}
    for name in TARGETS.names:
        for option in load_target(name).options:
            owners.setdefault(option.name, []).append(name)
            options[option.name] = option
    for name, option in options.items():
        default = f"{option.default / 1e9:g}GB" if option.kind == "size" else option.default
        yield Option(
            option.name,
            option.kind,
            f"{', '.join(owners[name])}: {option.help}  [default: {default}]",
            choices=option.choices,
            negatable=option.negatable,
        )


def _click_option(option: Option) -> click.Parameter:
    """Make an option for the command line; the value of an option that is not typed is None."""
    if option.kind is bool:
        flag = f"{option.flag}/--no-{option.flag.removeprefix('--')}" if option.negatable else option.flag
        return click.Option([flag, option.name], is_flag=True, default=None, help=option.help)
    kind: Any = click.Choice(option.choices) if option.choices else str if option.kind == "size" else option.kind
    return click.Option([option.flag, option.name], type=kind, help=option.help)


def _convert(family: str | None, **values: Any) -> None:
    import vlmconvert
    from vlmconvert.console import Reporter

    check_new_file("save-recipe", values["save_recipe"])
    target = load_target(values["target"])
    of_passes = [option.name for option in precision_options()]
    of_targets = [option.name for option in _target_options()]
    if values["recipe"] is not None:
        refuse_options(
            ("target", "llm", "vision", "max_size", *of_passes, *of_targets, *_CALIBRATION),
            "--recipe, which already sets it",
        )
    own = {option.name for option in (*precision_options(target.name), *target.options)}
    foreign = [name for name in (*of_passes, *of_targets) if name not in own]
    refuse_options((*foreign, *(() if target.traced else _CALIBRATION)), f"--target {target.name}")
    given = {name: value for name, value in values.items() if name not in foreign}
    result = vlmconvert.convert(family=family, reporter=Reporter(), **given)
    if not result.passed:
        sys.exit(1)
