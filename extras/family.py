"""The line of LLaVAs as data: what each model_type means where its config.json says nothing, and who reads it.

    1.5 → vipllava          several layers of the tower side by side, and a norm in front of the projector
        → llava_next        1.6: a picture in parts, as high as 672 x 672 or 1008 x 336 pixels (extras/anyres.py)
        → llava_onevision   the same with SigLIP, Qwen2 and finer grids

Everything else that differs from one checkpoint to the next is in its config.json: the kind of tower and of language
model. vision.VisionConfig.KINDS and llama.TextConfig.KINDS have their defaults.
"""

from dataclasses import dataclass, field

import weights
from extras import leftovers

ONEVISION_TOWER = dict(  # SigLIP's so400m at 384 pixels, without its last block
    model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26,
    num_attention_heads=16, image_size=384, patch_size=14,
)  # fmt: skip


@dataclass
class Kind:
    """One class of transformers."""

    architecture: str
    processor: str
    pictures: str  # its image_processor_type, None: the tower's
    defaults: dict = field(default_factory=dict)  # of its config, where they are not those of LlavaConfig
    has: tuple = ("vision_feature_select_strategy", "multimodal_projector_bias")  # those of SOME that its config has
    tower: dict = field(default_factory=lambda: weights.PUBLISHED_TOWER)
    text: str = "llama"


SOME = {  # fields that not every class has → whether the others may be given them: they compute as the default says
    "vision_feature_select_strategy": True, "multimodal_projector_bias": True, "image_grid_pinpoints": False,
    "vision_aspect_ratio": False, "video_token_index": False, "video_token_id": False,
    "projector_layernorm_eps": False, "vision_feature_layers": False,
}  # fmt: skip
KINDS = {
    "llava": Kind("LlavaForConditionalGeneration", "LlavaProcessor", None),
    "vipllava": Kind(
        "VipLlavaForConditionalGeneration", "LlavaProcessor", None,
        dict(vision_feature_layer=[-2, -5, -8, -11, 6], projector_layernorm_eps=1e-5),
        ("projector_layernorm_eps", "vision_feature_layers"),
    ),
    "llava_next": Kind(
        "LlavaNextForConditionalGeneration", "LlavaNextProcessor", "LlavaNextImageProcessor",
        dict(image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]),
        (*Kind.has, "image_grid_pinpoints"),
    ),
    "llava_onevision": Kind(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor",
        dict(
            image_token_index=151646, video_token_index=151647, vision_feature_layer=-1,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=[[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)],
        ),
        (*Kind.has, "image_grid_pinpoints", "vision_aspect_ratio", "video_token_index", "video_token_id"),
        ONEVISION_TOWER, "qwen2",
    ),
}  # fmt: skip


def clean(values, where):
    """The values of a config.json with the defaults of its class, and without what other programs left in it."""
    return leftovers.clean(complete(values, where), where)


def complete(values, where):
    """The values of a config.json with the defaults of its class, and without the fields that it does not have.

    Raises ValueError for one that another class would compute something else with.
    """
    kind = KINDS[values["model_type"]]
    given = {name: value for name, value in values.items() if value is not None}
    for name in [name for name in SOME if name in given and name not in kind.has]:
        value = given.pop(name)
        if not SOME[name] and value not in (False, "", [], {}):
            unknown = f"{where}: the field {name} = {value!r:.100} is none of a {values['model_type']}'s"
            raise ValueError(f"{unknown} and might change what the model computes")
    named = {weights.ALIASES.get(name, name) for name in given}
    values = given | {name: value for name, value in kind.defaults.items() if name not in named}
    tower, text = values.get("vision_config"), values.get("text_config")
    values["vision_config"] = {"model_type": kind.tower.get("model_type", "clip_vision_model"), **(tower or kind.tower)}
    values["text_config"] = {"model_type": kind.text, **(text or {})}
    return values
