"""The network: drop-in attention for Llama's family, pretrained models, runs, their folders, exports."""

from __future__ import annotations

from dti_model.model.attention import apply_dti, layers_of, model_inputs, token_logits, with_padding
from dti_model.model.calibration import TEMPERATURES, Calibration, log_odds
from dti_model.model.capture import Capture, CudaCapture, Forward, Outputs, are_close, reason_of
from dti_model.model.casting import cast_once
from dti_model.model.click_model import ClickModel
from dti_model.model.export import export_run
from dti_model.model.fetch import fetch_model
from dti_model.model.fingerprints import MODEL_FOLDER, OtherOriginError, Provenance
from dti_model.model.graphs import GraphedPasses, can_be_graphed, passes_of
from dti_model.model.lora import add_lora, keep_token_indices
from dti_model.model.parts import EAGER, Parts, compiled_parts
from dti_model.model.passes import PackedPass, Passes
from dti_model.model.past import LayerKeys, Past, concatenated
from dti_model.model.run import Run, llama_config, tokenizer_of
from dti_model.model.run_folder import (
    RunExistsError,
    check_model_is_ours,
)
from dti_model.model.safe_loading import fast_tokenizer_from, model_from
from dti_model.model.warm_start import init_fingerprint, train_targets
