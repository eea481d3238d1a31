"""The settings of a run: types, defaults, bounds, YAML, references to pretrained models, and places that a run keeps for its own files.

Imports neither torch nor transformers, so that `dti --help` starts at once.
"""

from __future__ import annotations

from dti_model.config.bounds import (
    GLUED,
    GROUPS,
    ITEM,
    LABEL,
    MODES,
    MORE_IS_BETTER,
    RULES,
    Metric,
    as_yaml,
    must_be,
)
from dti_model.config.file import CONFIG_FILE, ConfigFileError, is_run_config, is_sealed
from dti_model.config.older import NEWER, OLDER, both_given, newer_spelling, newer_value
from dti_model.config.places import check_new_folder, why_irreplaceable, why_owned
from dti_model.config.references import HUB, PretrainedModelError, Reference, locate
from dti_model.config.settings import (
    DTIConfig,
    LoraSettings,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check_reset_layers,
)
from dti_model.config.strict_yaml import StrictYAMLError, check_yaml, read_settings, with_underscores
