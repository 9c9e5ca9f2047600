"""``interstack convert``: a published student of another project as a folder that the other commands take."""

import logging

from lightning_modules.published.convert import convert_published

logger = logging.getLogger(__name__)


def convert(file: str, output: str, config: str | None = None, overwrite: bool = False) -> None:
    """Write a published student (DistilHuBERT, FitHuBERT, ARMHuBERT, DPHuBERT, ...) as a folder with a model card.

    Args:
        file: checkpoint that its authors published (docs/published.md).
        output: folder to write.
        config: YAML file that came with the checkpoint, whose section `distiller` gives heads and strides; default: the
            checkpoint's own settings, or else the published ones.
        overwrite: replace an earlier export in the output folder.
    """
    model, meta = convert_published(file, output, config, overwrite)
    converted = meta["converted"]
    if converted["assumed"]:
        logger.info("%s does not say, so the published values are used: %s", file, ", ".join(converted["assumed"]))
    if converted["left_out"]:
        logger.info("left out: %s", ", ".join(converted["left_out"]))
    message = "converted %s, %d layers, %d parameters to %s"
    logger.info(message, converted["layout"], model.config.num_hidden_layers, model.num_parameters(), output)
