"""Random weights to train from, and a vocabulary of another size."""

import torch
import torch.nn as nn

import llama


@torch.no_grad()
def init_weights(model):
    """Draw random weights for training from scratch, from the distributions of the reference.

    The vision tower as CLIPPreTrainedModel or SiglipPreTrainedModel does it. The projector and the language model as
    PreTrainedModel does it: normal with a standard deviation of 0.02, biases 0, norms 1.
    """
    normal, tower = nn.init.normal_, model.vision
    for module in tower.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    (init_siglip if tower.class_embedding is None else init_clip)(tower)

    for module in model.llama.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            normal(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, llama.RMSNorm):
            nn.init.ones_(module.weight)
    for norm in model.projector.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.reset_parameters()
    if model.image_newline is not None:
        normal(model.image_newline, std=len(model.image_newline) ** -0.5)
    for layer in (model.projector.linear_1, model.projector.linear_2):
        normal(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_clip(tower):
    """All of a tower normal, narrower the more blocks there are; biases are 0 already."""
    normal = nn.init.normal_
    width, scale = tower.config.hidden_size, (2 * tower.config.num_hidden_layers) ** -0.5
    normal(tower.class_embedding, std=width**-0.5)
    normal(tower.patch_embedding.weight, std=0.02)
    normal(tower.position_embedding, std=0.02)
    for block in tower.blocks:
        for w in (block.attention.wq, block.attention.wk, block.attention.wv, block.mlp.fc2):
            normal(w.weight, std=width**-0.5 * scale)
        normal(block.attention.wo.weight, std=width**-0.5)
        normal(block.mlp.fc1.weight, std=(2 * width) ** -0.5)


def init_siglip(tower):
    """Xavier's uniform in the blocks (Glorot and Bengio 2010), and nearly LeCun's normal for the patches."""
    normal, seen = nn.init.normal_, tower.patch_embedding.weight[0].numel()
    normal(tower.position_embedding, std=tower.config.hidden_size**-0.5)
    # wider by what a cut at 2 standard deviations would take away; the reference cuts at 2 itself, where nothing is
    normal(tower.patch_embedding.weight, std=seen**-0.5 / 0.87962566103423978)
    for block in tower.blocks:
        attention, mlp = block.attention, block.mlp
        for w in (attention.wq, attention.wk, attention.wv, attention.wo, mlp.fc1, mlp.fc2):
            nn.init.xavier_uniform_(w.weight)
        for w in (mlp.fc1, mlp.fc2):
            normal(w.bias, std=1e-6)


@torch.no_grad()
def resize_token_embeddings(model, n):
    """Give embedding and head n rows, for a vocabulary of another size (PreTrainedModel.resize_token_embeddings).

    New rows are drawn around the mean of the old ones, with 1e-9 of their covariance: no new word is likelier than an
    average one (Hewitt 2021, "Initializing new word embeddings").
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"the vocabulary cannot have {n!r} rows: give an integer of at least 1")
    if not isinstance(model.llama.head, nn.Linear):
        raise ValueError(
            "a quantised or packed model cannot be resized: load it without quantize, compile or inference mode"
        )

    def resized(weight):
        if n == len(weight):
            return weight
        rows, new = weight.float(), max(0, n - len(weight))
        spread = (rows - rows.mean(0)) / len(rows) ** 0.5  # spreadᵀ spread is the covariance
        drawn = rows.mean(0) + 1e-9**0.5 * rows.new_empty(new, len(rows)).normal_() @ spread
        return nn.Parameter(torch.cat([weight[:n], drawn.to(weight.dtype)]), weight.requires_grad)

    embed, head = model.llama.embed, model.llama.head
    tied = head.weight is embed.weight
    embed.weight = resized(embed.weight)
    head.weight = embed.weight if tied else resized(head.weight)
    embed.num_embeddings = head.out_features = model.config.text_config.vocab_size = n
    return embed
