"""`vlmconvert describe`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmconvert.commands import at_least, check_new_file, require_options

__all__ = ["describe"]


@click.command(
    help="""Let a model describe a folder of images, so that vlmconvert referee can compare two models.

    The model is a checkpoint or an artifact on this machine (Ascend artifacts run without an NPU), or a model behind a server
    such as vllm-ascend (--endpoint). --answers imports descriptions that MindIE has already written: the predict_result.json
    of run_pa.sh --precision. MindIE's script builds prompts differently from vlmconvert, so use it for both models or for
    neither, and give the same settings here that it was run with. A run that was killed continues where it stopped.

    \b
    Examples:
      vlmconvert describe ./checkpoint --images coco -o float.json
      vlmconvert describe --endpoint http://localhost:8000/v1 --images coco -o artifact.json
      vlmconvert describe llava-w8a16 --answers predict_result.json --prompt "Describe this image." --max-new-tokens 256 \
          --images coco -o artifact.json
    """
)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of images.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File for the descriptions.")
@click.option("--endpoint", help="Address of an OpenAI-compatible server.")
@click.option("--answers", type=click.Path(path_type=Path), help="File of answers that MindIE has written.")
@click.option(
    "--prompt", default="Describe this image in detail.", show_default=True, help="The question about each image."
)
@click.option("--max-new-tokens", default=256, show_default=True, help="Maximum number of tokens of an answer.")
@click.option("--ignore-eos", is_flag=True, help="Answer with exactly --max-new-tokens tokens.")
@click.option("--count", default=0, help="Describe only the first COUNT images.  [default: all]")
@click.option(
    "--batch", default=1, show_default=True, help="Number of images that are described together, on this machine."
)
def describe(
    folder: Path | None,
    images: Path,
    output: Path,
    endpoint: str | None,
    answers: Path | None,
    prompt: str,
    max_new_tokens: int,
    ignore_eos: bool,
    count: int,
    batch: int,
) -> None:
    """See the help."""
    from manifests.descriptions import Decoding, write_descriptions
    from manifests.errors import BadInputError
    from vlmconvert import load_processor
    from vlmconvert.console import Reporter
    from vlmconvert.measuring.describe import EndpointDescriber, described, import_answers, list_images, open_describer
    from vlmconvert.running.endpoint import Endpoint

    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("count", count, 0), ("batch", batch, 1)):
        at_least(name, value, least)
    check_new_file("output", output)
    if folder is None and endpoint is None:
        raise BadInputError("there is no model to ask: give a folder, or the address of a server with --endpoint")
    if answers is not None:
        require_options(("prompt", "max_new_tokens"), "--answers, whose file does not say how the model was asked")
    if endpoint is not None and (folder is not None or answers is not None):
        raise BadInputError("--endpoint already chooses the model and its answers: leave out the folder and --answers")
    chosen = list_images(images, count)
    decoding = Decoding(prompt=prompt, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos)
    reporter = Reporter()
    partial = output.with_name(f"{output.name}.partial")
    if answers is not None and folder is not None:
        end = load_processor(folder).tokenizer.eos_token or ""
        found = import_answers(answers, chosen, folder.resolve().name, decoding, end)
    else:
        with reporter.stage("opening the model"):
            describer = open_describer(folder) if folder is not None else EndpointDescriber(Endpoint(endpoint or ""))
        with reporter.stage("describing", len(chosen)) as step:
            found = described(describer, chosen, decoding, partial, batch, step)
    write_descriptions(found, output)
    partial.unlink(missing_ok=True)
    reporter.say(f"{output}: {len(chosen)} images by {found.model}")
