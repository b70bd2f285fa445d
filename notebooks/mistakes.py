"""The mistakes that people make in the exercises, for `check`: what to say → a function that makes the mistake.

`check` says the sentence where a solution gives what the mistake gives, in every case. tests/wrong_answers.txt holds
wrong answers as they are typed, with what each is to be told.
"""

import itertools
import json
import math
import struct

import torch
import torch.nn as nn
import torch.nn.functional as F
import train

import llama
import llava
from extras import lens


def of(number, *context):
    """The mistakes of an exercise, such as "3.1". context: what they need of its notebook."""
    return globals()["exercise_" + number.replace(".", "_")](*context)


def exercise_1_1():
    return {
        "the image token is replaced by the patches: you counted it as well":
            lambda w, p, g: w + p * g * g,
        "there may be several pictures, or none: each takes its own token away":
            lambda w, p, g: w + p * g * g - 1,
        "there may be several pictures, or none, and each has its patches":
            lambda w, p, g: w - 1 + g * g,
        "each picture has its patches, not only the first":
            lambda w, p, g: w - p + g * g,
        "a picture has grid × grid patches, not grid": lambda w, p, g: w + p * (g - 1),
        "a picture has grid × grid patches, not 2 · grid":
            lambda w, p, g: w + p * (2 * g - 1),
        "a picture has grid × grid patches, not 2 · grid; and each takes its own token away":
            lambda w, p, g: w + p * 2 * g,
        "each image token grows into patches, the other words stay one each":
            lambda w, p, g: w * g * g,
        "the words are missing": lambda w, p, g: p * g * g,
        "there may be several pictures, or none; and each takes its own token away":
            lambda w, p, g: w + g * g,
        "only the words are counted": lambda w, p, g: w,
        "only the words that are not pictures are counted": lambda w, p, g: w - p,
        "`^` is not a power in Python (it is XOR): write `**`":
            lambda w, p, g: w + p * (g ^ 2 - 1),
        "`^` is XOR in Python, not a power: write `**`":
            lambda w, p, g: w + p * ((g ^ 2) - 1),
    }


def exercise_1_2():
    def by_value(ids, features, table, image_id):
        x, at = table[ids].masked_fill((ids == image_id)[:, None], 0), iter(features)
        return torch.stack([next(at, row) if not row.any() else row for row in x])

    return {
        "the picture is in front of the words, not among them":
            lambda i, f, t, n: torch.cat([f, t[i[i != n]]]),
        "the picture is behind the words, not among them":
            lambda i, f, t, n: torch.cat([t[i[i != n]], f]),
        "the patches are not there: the image token is embedded like a word":
            lambda i, f, t, n: t[i],
        "the patches go where the image tokens stand, in order: it is always the first":
            lambda i, f, t, n: torch.where((i == n)[:, None], f[0], t[i]),
        "the patches are in the order of the row, not backwards":
            lambda i, f, t, n: t[i].masked_scatter((i == n)[:, None], f.flip(0)),
        "replace the embedding of the image token: you added to it":
            lambda i, f, t, n: t[i].masked_scatter((i == n)[:, None], f + t[n]),
        "by position, not by value: an embedding that is all zeros is a word, too":
            by_value,
        "the words are missing: where no picture stands, it is `table[id]`":
            lambda i, f, t, n: torch.zeros_like(t[i]).masked_scatter((i == n)[:, None], f),
        "each image token takes a patch of its own, not the mean of all":
            lambda i, f, t, n: torch.where((i == n)[:, None], f.mean(0), t[i]),
        "one patch for each image token: all of them stand at each":
            lambda i, f, t, n: torch.cat([f if x == n else t[x][None] for x in i]),
        "where it is the image token: you exchanged the two": lambda i, f, t, n:
            torch.zeros_like(t[i]).masked_scatter((i != n)[:, None], f),
    }


def exercise_1_3():
    def greedy(model, ids, pixels, n, steps=None, blind=False, least=False, at=-1):
        new = []
        for _ in range(n if steps is None else steps):
            row = torch.cat([ids, torch.tensor([new], dtype=torch.int64)], 1)
            with torch.no_grad():
                logits = model(row, pixels * 0 if blind else pixels).logits[0, at]
            new.append(int(logits.argmin() if least else logits.argmax()))
        return new

    def fixed(model, ids, pixels, n):
        with torch.no_grad():
            return [int(model(ids, pixels).logits[0, -1].argmax())] * n

    def at_once(model, ids, pixels, n):
        with torch.no_grad():
            return model(ids, pixels).logits[0, -n:].argmax(-1).tolist()

    return {
        "append each new id before the next step, at the end: its last position is always the same": fixed,
        "the last position chooses the next word, one at a time": at_once,
        "take the likeliest: this is the least likely": lambda m, i, p, n:
            greedy(m, i, p, n, least=True),
        "the picture is not given": lambda m, i, p, n: greedy(m, i, p, n, blind=True),
        "the last position chooses, not the first": lambda m, i, p, n:
            greedy(m, i, p, n, at=0),
        "the last position chooses, not the last but one": lambda m, i, p, n:
            greedy(m, i, p, n, at=-2),
        "one word too many": lambda m, i, p, n: greedy(m, i, p, n, n + 1),
        "one word too few": lambda m, i, p, n: greedy(m, i, p, n, n - 1),
        "only the new ids, without the prompt's": lambda m, i, p, n:
            i[0].tolist() + greedy(m, i, p, n),
    }


def exercise_2_1():
    def right_patches(pictures, size):
        return F.unfold(pictures, size, stride=size).transpose(1, 2)

    def scattered(x, s):
        n, c, h, w = x.shape
        x = x.reshape(n, c, s, h // s, s, w // s).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(n, (h // s) * (w // s), -1)

    def arranged(order):
        def cut(x, s):
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // s, s, w // s, s).permute(0, *order)
            return x.reshape(n, (h // s) * (w // s), -1)

        return cut

    return {
        "channels come last within a patch, and should come first":
            arranged((2, 4, 3, 5, 1)),
        "patches go column by column, and should go row by row":
            arranged((4, 2, 1, 3, 5)),
        "within a patch the pixels go column by column, and should go row by row":
            arranged((2, 4, 1, 5, 3)),
        "the numbers are only reshaped: a patch is a square, not a stretch of memory":
            lambda x, s: x.reshape(len(x), (x.shape[2] // s) * (x.shape[3] // s), -1),
        "a side splits into (patches, size), not into (size, patches)": scattered,
        "a patch is a square: these are stretches of each channel's memory":
            lambda x, s: x.flatten(2).unflatten(2, (-1, s * s)).transpose(1, 2).flatten(2),
        "all channels belong into each patch: here each channel has patches of its own":
            lambda x, s: x.unfold(2, s, s).unfold(3, s, s).flatten(1, 3).flatten(2),
        "the axes within a patch and those of the patches are mixed up":
            arranged((3, 5, 1, 2, 4)),
        "a patch takes all three channels: only one is there":
            lambda x, s: right_patches(x[:, :1], s),
        "the patches overlap: the stride is the size of a patch":
            lambda x, s: F.unfold(x, s).transpose(1, 2),
        "patches first, then the numbers of each: (N, P, 3 · size²)":
            lambda x, s: F.unfold(x, s, stride=s),
    }


def exercise_2_2():
    def attention(scale=0.5, axis=-1, causal=False, values="v", soft=True):
        def attend(q, k, v):
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** scale
            if causal:
                seen = torch.ones(q.shape[2], q.shape[2]).tril().bool()
                scores = scores.masked_fill(~seen, -torch.inf)
            weights = scores.softmax(axis) if soft else scores
            return weights if values is None else weights @ {"v": v, "k": k, "q": q}[values]

        return attend

    return {
        "the scores are not divided by √E": attention(0),
        "they are divided by E, not by its root": attention(1),
        "they are divided by half of E, not by its root": lambda q, k, v:
            attention(1)(2 * q, k, v),
        "they are multiplied by √E, not divided": attention(-0.5),
        "√E is the root of a head's width (the last axis), not of the length":
            lambda q, k, v: attention(0)(q / q.shape[2] ** 0.5, k, v),
        "√E is the root of a head's width (the last axis), not of the number of heads":
            lambda q, k, v: attention(0)(q / q.shape[1] ** 0.5, k, v),
        "the softmax runs over the queries, not over the keys": attention(axis=-2),
        "the softmax runs over the heads, not over the keys": attention(axis=1),
        "there is no softmax: the weights of a query do not sum to 1":
            attention(soft=False),
        "each position is compared with each: q kᵀ, and not qᵀ k": lambda q, k, v:
            (q.transpose(2, 3) @ k / q.shape[-1] ** 0.5).softmax(-1) @ v.transpose(2, 3),
        "the scores are divided by √E before the softmax, not the weights behind it":
            lambda q, k, v: attention(0)(q, k, v) / q.shape[-1] ** 0.5,
        "the weights are (queries, keys): you transposed them before the values":
            lambda q, k, v:
            (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).transpose(2, 3) @ v,
        "the weights of a query have to sum to 1: divide by their sum":
            lambda q, k, v: (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).exp() @ v,
        "every patch sees every patch: nothing is masked here": attention(causal=True),
        "the weights are there, the values are not": attention(values=None),
        "it is the values that are averaged, not the keys": attention(values="k"),
        "it is the values that are averaged, not the queries": attention(values="q"),
        "the keys' side is transposed, not the queries'": lambda q, k, v:
            attention()(k, q, v),
    }


def exercise_2_3():
    def blocks(tower, x, skip=0, cut=1, norm=False, before=True):
        x = tower.embed(x)
        for block in tower.blocks[skip : -cut or None]:
            x = block(x)
        return tower.post_norm(x) if norm else x

    def without_class(tower, x):
        x = tower.embed(x)[:, 1:]
        for block in tower.blocks[:-1]:
            x = block(x)
        return x

    def twice_added(tower, x):
        x = tower.embed(x)
        for block in tower.blocks[:-1]:
            x = x + block(x)
        return x[:, 1:]

    return {
        "the last block is run, too": lambda t, x: t(x, [-1])[0][:, 1:],
        "the class token is still there": lambda t, x: t(x, [-2])[0],
        "the last block is run, too, and the class token is still there":
            lambda t, x: t(x, [-1])[0],
        "the class token stands in front: you dropped the last patch":
            lambda t, x: t(x, [-2])[0][:, :-1],
        "that is the class token: the patches are wanted":
            lambda t, x: t(x, [-2])[0][:, 0],
        "one block is missing: only the last is left out":
            lambda t, x: t(x, [-3])[0][:, 1:],
        "the first block is left out, and should be the last":
            lambda t, x: blocks(t, x, 1, 0)[:, 1:],
        "no block is run": lambda t, x: t.embed(x)[:, 1:],
        "the class token goes through the blocks, too, and is left out behind them":
            without_class,
        "a block adds what went in by itself: `x = block(x)`": twice_added,
        "post_norm is for CLIP's own output: what LLaVA reads comes before it":
            lambda t, x: blocks(t, x, norm=True)[:, 1:],
        "each block takes what the one before gave": lambda t, x:
            t.blocks[-2](t.embed(x))[:, 1:],
    }


def exercise_3_1():
    def variant(inside=True, mean=True, full=True, root=True, centre=False):
        def norm(x, w, e):
            y = x.float() if full else x
            y = y - y.mean(-1, keepdim=True) if centre else y
            size = y.pow(2).mean(-1, keepdim=True) if mean else y.pow(2).sum(-1, keepdim=True)
            size = size + e if inside else size
            size = size.sqrt() if root else size
            return w * (y / (size if inside else size + e)).to(x.dtype)

        return norm

    return {
        "the squares overflow: compute in float32": variant(full=False),
        "ε stands outside of the root": variant(inside=False),
        "ε stands outside of the root, and the squares overflow: compute in float32":
            variant(inside=False, full=False),
        "there is no ε, or hardly any: it is added to the mean of the squares": lambda x, w, e: variant()(x, w, 0.0),
        "ε is the argument eps, and not always 1e-5": lambda x, w, e: variant()(x, w, 1e-5),
        "the weight is missing": lambda x, w, e: variant()(x, torch.ones_like(w), e),
        "that is LayerNorm: RMSNorm does not take the mean away": variant(centre=True),
        "the standard deviation takes the mean away, RMSNorm does not": lambda x, w, e:
            w * (x.float() / (x.float().std(-1, keepdim=True) + e)).to(x.dtype),
        "that is the length of x: it is the root of the mean of the squares, and of ε":
            lambda x, w, e: w * (x.float() / x.float().norm(dim=-1, keepdim=True)).to(x.dtype),
        "the sum of the squares: it is their mean": variant(mean=False),
        "there is no root": variant(root=False),
        "the mean is over the rows: it is over the last axis": lambda x, w, e:
            w * (x.float() * (x.float().pow(2).mean(0) + e).rsqrt()).to(x.dtype),
        "the mean is over everything: each position has its own": lambda x, w, e:
            w * (x.float() * (x.float().pow(2).mean() + e).rsqrt()).to(x.dtype),
        "the result is in float32: give back x's dtype":
            lambda x, w, e: (lambda y: w * (y * (y.pow(2).mean(-1, keepdim=True) + e)
                                            .rsqrt()))(x.float()),
    }


def exercise_3_2():
    def right_mask(S, new):
        real = torch.ones(1, S, dtype=torch.bool)
        return llama.visible(real, torch.arange(S - new, S))[0, 0]

    return {
        "the queries are the last positions, not the first":
            lambda S, new: torch.ones(new, S).tril().bool(),
        "a query sees itself, too":
            lambda S, new: torch.ones(new, S).tril(S - new - 1).bool(),
        "a query sees one position too far":
            lambda S, new: torch.ones(new, S).tril(S - new + 1).bool(),
        "earlier keys are seen, later ones are not: it is the other way round":
            lambda S, new: torch.ones(new, S).triu(S - new).bool(),
        "True is what may be seen: it is inverted":
            lambda S, new: ~right_mask(S, new),
        "True and False are wanted, not what is added to the scores":
            lambda S, new: torch.full((new, S), -torch.inf).triu(S - new + 1),
        "everybody sees everything: a query must not see what comes later":
            lambda S, new: torch.ones(new, S).bool(),
        "only the new positions are there: the keys are all S":
            lambda S, new: torch.ones(new, new).tril().bool(),
        "all S positions are there: the queries are the last `new` only":
            lambda S, new: torch.ones(S, S).tril().bool(),
    }


def counted(answer):
    """What an answer to 3.3 gives, and how many positions each pass computed."""

    def run(model, x, cut, n):
        passes = []
        listen = model.llama.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
        try:
            ids = answer(model, x, cut, n)
        finally:
            listen.remove()
        if ids is ...:
            return ...
        if len(passes) == n + 2 and passes[-1] == 1:
            passes.pop()  # one more, whose word nobody takes
        return {"ids": ids, "positions in each pass": passes}

    return run


def chunks(start=0, keep=False, whole=False, count=0, fresh=False, everything=False, at=-1):
    """An answer to 3.3, right as it is."""

    @torch.no_grad()
    def run(model, x, cut, n):
        caches = [model.init_kv_cache(1, 3 * x.shape[1] + n * (x.shape[1] + n)) for _ in range(2)]
        if not whole:
            model(inputs_embeds=x[:, :cut], kv_cache=caches[0])
        cache, ids = caches[fresh], []
        x = x if keep or whole else x[:, max(0, cut + start) :]
        for _ in range(n + count):
            ids.append(int(model(inputs_embeds=x, kv_cache=cache).logits[0, at].argmax()))
            new = model.llama.embed(torch.tensor([[ids[-1]]]))
            x = torch.cat([x, new], 1) if everything else new
        return ids

    return run


def two_chunks(model, x, cut, n):
    """Right: the prompt in two chunks, then n words."""
    return chunks()(model, x, cut, n)


def exercise_3_3():
    def repeated(model, x, cut, n):
        cache = model.init_kv_cache(1, x.shape[1])
        with torch.no_grad():
            model(inputs_embeds=x[:, :cut], kv_cache=cache)
            logits = model(inputs_embeds=x[:, cut:], kv_cache=cache).logits
        return [int(logits[0, -1].argmax())] * n

    def early(model, x, cut, n):
        cache = model.init_kv_cache(1, x.shape[1] + n)
        with torch.no_grad():
            ids = [int(model(inputs_embeds=x[:, :cut], kv_cache=cache).logits[0, -1].argmax())]
            x = x[:, cut:]
            for _ in range(n - 1):
                ids.append(int(model(inputs_embeds=x, kv_cache=cache).logits[0, -1].argmax()))
                x = model.llama.embed(torch.tensor([[ids[-1]]]))
        return ids

    def exchanged(model, x, cut, n):
        return chunks()(model, torch.cat([x[:, cut:], x[:, :cut]], 1), x.shape[1] - cut, n)

    def plain_chunks(model, x, cut, n):
        ids = []
        for _ in range(n):
            ids.append(int(model(inputs_embeds=x).logits[0, -1].argmax()))
            x = torch.cat([x, model.llama.embed(torch.tensor([[ids[-1]]]))], 1)
        return ids

    return {
        name: counted(mistake)
        for name, mistake in {
            "the second chunk is the whole prompt: give only what is behind the cut":
                chunks(keep=True),
            "the prompt is given at once: two chunks are wanted": chunks(whole=True),
            "each pass is given everything again: with a cache, only what is new":
                chunks(everything=True),
            "the second chunk begins one position too late": chunks(1),
            "the second chunk begins one position too early": chunks(-1),
            "the last position chooses the next word, not the first": chunks(at=0),
            "one word too many": chunks(count=1),
            "one word too few": chunks(count=-1),
            "the second chunk needs the cache of the first, not a new one":
                chunks(fresh=True),
            "there is no cache: every pass computes everything again": plain_chunks,
            "each new word has to be given to the model before the next": repeated,
            "the first word comes behind the whole prompt, not behind its first chunk": early,
            "the beginning of the prompt comes first: you exchanged the chunks": exchanged,
            "the first chunk is never given": lambda m, x, c, n:
                chunks(whole=True)(m, x[:, c:], c, n),
        }.items()
    }


def exercise_4_1():
    def counted(c, d):
        config = llava.LlavaConfig(
            train.VisionConfig(hidden_size=c), train.TextConfig(hidden_size=d)
        )
        parts = nn.Linear(c, d), llava.Projector(config)
        return tuple(sum(p.numel() for p in part.parameters()) for part in parts)

    return {
        "the biases are missing": lambda c, d: (c * d, c * d + d * d),
        "the biases are missing in the second answer": lambda c, d: (
            (c + 1) * d, c * d + d * d),
        "the second layer has a bias, too": lambda c, d: (
            (c + 1) * d, (c + 1) * d + d * d),
        "the second layer goes from d to d: you counted c × d twice": lambda c, d: (
            (c + 1) * d, 2 * (c + 1) * d),
        "the second layer goes from d to d: you went back to c": lambda c, d: (
            (c + 1) * d, (c + 1) * d + (d + 1) * c),
        "a bias is one number for each output, not for each input": lambda c, d: (
            c * d + c, c * d + c + d * d + d),
        "the second layer has d × d weights, too, not its bias alone": lambda c, d: (
            (c + 1) * d, (c + 1) * d + d),
        "a bias is one number for each output, not one for a layer": lambda c, d: (
            c * d + 1, c * d + 1 + d * d + 1),
        "the two layers are added, not multiplied": lambda c, d: (
            (c + 1) * d, (c + 1) * d * (d + 1) * d),
        "the second answer is of both layers together": lambda c, d: (
            (c + 1) * d, (d + 1) * d),
        "first one layer, then two: they are exchanged": lambda c, d: counted(c, d)[::-1],
    }


def exercise_4_2():
    def flat(logits, labels, **options):
        x, y = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(x, y, **options)

    def chosen(logits, labels):
        labels = labels[:, 1:]
        return logits[:, :-1].gather(2, labels[..., None].clamp(min=0))[..., 0][labels >= 0]

    def rows(logits, labels):
        each = zip(logits, labels, strict=True)
        return torch.stack([llava.next_token_loss(a[None], b[None]) for a, b in each])

    return {
        "the labels are not shifted: position t predicts t + 1": lambda x, y:
            F.cross_entropy(x.flatten(0, 1), y.flatten()),
        "shifted the wrong way: position t predicts t + 1, not t - 1": lambda x, y:
            F.cross_entropy(x[:, 1:].flatten(0, 1), y[:, :-1].flatten()),
        "what is -100 counts, too": lambda x, y: flat(x, y.clamp(min=0)),
        "0 is an id like the others: what does not count is -100": lambda x, y:
            flat(x, y.masked_fill(y == 0, -100)),
        "the mean is over the labels behind the shift: nothing predicts the first": lambda x, y:
            flat(x, y, reduction="sum") / (y != -100).sum(),
        "the sum, and should be the mean": lambda x, y: flat(x, y, reduction="sum"),
        "the mean is over all positions, those with -100 as well": lambda x, y:
            flat(x, y, reduction="none").mean(),
        "the mean is over rows, and should be over all tokens": lambda x, y:
            rows(x, y).mean(),
        "one loss for each row, and should be one for all": rows,
        "the sign: a loss is -log p": lambda x, y: -flat(x, y),
        "that is p, and should be -log p": lambda x, y: chosen(x.softmax(-1), y).mean(),
        "there is no softmax: -log p, with p = softmax(logits)": lambda x, y:
            -chosen(x, y).mean(),
        "one number for each token, and should be their mean": lambda x, y:
            flat(x, y, reduction="none"),
        "the softmax is over the vocabulary, not over the positions": lambda x, y:
            -chosen(x.log_softmax(1), y).mean(),
    }


def exercise_4_3():
    return {
        "the mean is over pictures, too": lambda x:
            x.mean((0, 1), keepdim=True).expand_as(x),
        "the mean is over pictures, and should be over patches": lambda x:
            x.mean(0, keepdim=True).expand_as(x),
        "the mean is over the channels, and should be over patches": lambda x:
            x.mean(2, keepdim=True).expand_as(x),
        "one vector per picture is left; there should be one per patch": lambda x:
            x.mean(1, keepdim=True),
        "one vector per picture is left, without an axis of patches": lambda x:
            x.mean(1),
        "the sum, and should be the mean": lambda x: x.sum(1, keepdim=True).expand_as(x),
        "every patch is the first one: the mean of all is wanted": lambda x:
            x[:, :1].expand_as(x),
        "the mean is taken away: it is what should be left": lambda x:
            x - x.mean(1, keepdim=True),
        "the patches are backwards, but each is still there": lambda x: x.flip(1),
        "nothing is changed": lambda x: x,
        "the largest is no mean": lambda x: x.amax(1, keepdim=True).expand_as(x),
        "the median is no mean": lambda x:
            x.median(1, keepdim=True).values.expand_as(x),
    }


def exercise_5_1():
    return {
        "that is the mean, not the median": lens.without_sinks,
        "the median is over patches, and should be over words": lambda w:
            (w - w.median(1, keepdim=True).values).clamp(min=0),
        "one median for everything: each patch has its own": lambda w:
            (w - w.median()).clamp(min=0),
        "what is below it counts as 0: cut there": lambda w: w - w.median(0).values,
        "cut at 0, do not take the absolute value": lambda w:
            (w - w.median(0).values).abs(),
        "the other way round: the median is taken from the attention": lambda w:
            (w.median(0).values - w).clamp(min=0),
        "the largest is taken away, and should be the median": lambda w:
            (w - w.max(0).values).clamp(min=0),
        "the smallest is taken away, and should be the median": lambda w:
            (w - w.min(0).values).clamp(min=0),
        "subtract it, do not divide by it": lambda w: w / w.median(0).values,
        "what is above the median stays, but less the median": lambda w:
            w.where(w > w.median(0).values, torch.zeros(())),
        "what is at the median or above stays, but less the median": lambda w:
            w.where(w >= w.median(0).values, torch.zeros(())),
        "only the medians are left": lambda w: w.median(0).values.expand_as(w),
        "what is above it is cut off, and should be what is below": lambda w:
            (w - w.median(0).values).clamp(max=0),
    }


def exercise_5_2(config):
    def attended(turned="qk", mask=True, scale=0.5, swap=False, late=False, soft=True):
        """The attention, or one with a mistake."""

        def attention(stages, i):
            split = config.num_attention_heads, config.head_dim
            q, k = (
                stages[f"llama.{i}.{x}"].unflatten(-1, split).transpose(1, 2) for x in "qk"
            )
            at = torch.arange(q.shape[2])
            angles = llama.rope_angles(at[None], llama.frequencies(config))
            q = llama.rotate(q, *angles) if "q" in turned else q
            k = llama.rotate(k, *angles) if "k" in turned else k
            q, k = (k, q) if swap else (q, k)
            scores = q @ k.transpose(2, 3) / config.head_dim**scale
            unseen = at < at[:, None] if late is None else at > at[:, None]
            if late:
                return scores.softmax(-1).masked_fill(unseen, 0)
            scores = scores.masked_fill(unseen, -torch.inf) if mask else scores
            return scores.softmax(-1) if soft else scores

        return attention

    def uncut(stages, i):
        q, k = (stages[f"llama.{i}.{x}"] for x in "qk")
        return (q @ k.transpose(1, 2) / config.head_dim**0.5).softmax(-1)

    def viewed(stages, i):
        sizes = 1, config.num_attention_heads, -1, config.head_dim
        q, k = (stages[f"llama.{i}.{x}"].reshape(sizes) for x in "qk")
        at = torch.arange(q.shape[2])
        angles = llama.rope_angles(at[None], llama.frequencies(config))
        scores = llama.rotate(q, *angles) @ llama.rotate(k, *angles).transpose(2, 3)
        scores = scores / config.head_dim**0.5
        return scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1)

    return {
        "nothing is rotated: q and k do not know where they stand": attended(""),
        "the keys are rotated, the queries are not": attended("k"),
        "the queries are rotated, the keys are not": attended("q"),
        "there is no mask: a position must not see what comes later": attended(mask=False),
        "the mask is the other way round: hidden is what comes later": attended(late=None),
        "there is neither rotation nor mask": attended("", mask=False),
        "the scores are not divided by √E": attended(scale=0),
        "they are divided by E, not by its root": attended(scale=1),
        "q and k are exchanged": attended(swap=True),
        "mask before the softmax, or the rows do not sum to 1": attended(late=True),
        "there is no softmax": attended(soft=False),
        "that is another layer: count from 1": lambda s, i: s[f"attention.{i + 1}"],
        "the mean of the heads: each of them is wanted": lambda s, i:
            s[f"attention.{i}"].mean(1, keepdim=True),
        "cut q and k into heads first": uncut,
        "`view` takes positions for heads: unflatten the last axis, then transpose": viewed,
    }


def exercise_5_3():
    def silenced(pick):
        """The logits while the weight that pick chooses is zero."""

        def run(model, inputs, layer):
            weight = pick(model.llama.blocks[layer % len(model.llama.blocks)])
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.zero_()
                logits = model(**inputs).logits
                weight.copy_(kept)
            return logits

        return run

    without = silenced(lambda block: block.attention.wo.weight)

    return {
        "nothing is knocked out": lambda m, x, layer: m(**x).logits.detach(),
        "that is another layer: they count from 0": lambda m, x, layer:
            without(m, x, layer + 1),
        "that is another layer: not the one before": lambda m, x, layer:
            without(m, x, layer - 1),
        "the MLP is knocked out, and should be the attention":
            silenced(lambda block: block.mlp.down.weight),
        "only the queries are zero, or only the keys: attention still averages the values":
            silenced(lambda block: block.attention.wq.weight),
        "it is always the first layer": lambda m, x, layer: without(m, x, 0),
        "it is always the last layer": lambda m, x, layer: without(m, x, -1),
        "the logits of all positions, not of the last alone": lambda m, x, layer:
            without(m, x, layer)[:, -1:],
        "the logits, and not what is likeliest": lambda m, x, layer:
            without(m, x, layer).argmax(-1),
        "the logits, and not their softmax": lambda m, x, layer:
            without(m, x, layer).softmax(-1),
    }


def exercise_6_1():
    before = ["ids", "pixels", *(f"vision.{i}" for i in range(5)), "projector", "vision"]

    later = [f"{part}.{i}" for i in (2, 3, 4) for part in ("llama", "attention")]
    later += [f"llama.{i}.{x}" for i in (2, 3, 4) for x in "qkv"]
    return {
        "the embeddings hold no position yet: they are the same": "merge",
        "that is where it shows last": "logits",
        "the decoder's blocks are counted from 1": "llama.0",
        "which block? The name of a stage has a number": "llama",
    } | {
        f"{name} comes before the prompt: it knows no position in it": name for name in before
    } | {
        f"it shows in {name}, too, but earlier as well": name for name in later
    } | {
        f"{name} is heard before the rotation: it knows no position yet": name
        for name in ("llama.1.q", "llama.1.k", "llama.1.v")
    }


def exercise_6_2():
    def largest(a, b):
        return (a - b).abs().max()

    def measure(top=largest, bottom=lambda a, b: b.abs().max(), else_=float("inf")):
        def relative(a, b):
            return else_ if a.shape != b.shape else float(top(a, b) / bottom(a, b))

        return relative

    def by_length(a, b):
        return float(largest(a, b) / b.abs().max()) if len(a) == len(b) else float("inf")

    return {
        "compare the shapes: two of the same length may differ in another axis": by_length,
        "without the sign: a large negative difference is a difference":
            measure(lambda a, b: (a - b).max()),
        "it is relative to the first, and should be to the second":
            measure(bottom=lambda a, b: a.abs().max()),
        "the largest number is the largest without its sign":
            measure(bottom=lambda a, b: b.max()),
        "relative to the second, not to the larger of the two":
            measure(bottom=lambda a, b: torch.maximum(a.abs().max(), b.abs().max())),
        "the largest difference, not the sum of all":
            measure(lambda a, b: (a - b).abs().sum(), lambda a, b: b.abs().sum()),
        "the largest difference, and not the mean":
            measure(lambda a, b: (a - b).abs().mean()),
        "relative to the largest number, not to each by itself":
            measure(lambda a, b: ((a - b).abs() / b.abs()).max(), lambda a, b: 1),
        "it is not relative yet: divide by the largest number of the second":
            measure(bottom=lambda a, b: 1),
        "relative to the largest number, not to the mean":
            measure(bottom=lambda a, b: b.abs().mean()),
        "the largest difference, not the length of the difference":
            measure(lambda a, b: (a - b).norm(), lambda a, b: b.norm()),
        "the largest difference, not its square":
            measure(lambda a, b: (a - b).pow(2).max()),
        "the largest of the differences, not the difference of the largest":
            measure(lambda a, b: (a.abs().max() - b.abs().max()).abs()),
        "if the shapes differ it is infinite, not 0": measure(else_=0.0),
    }


def exercise_6_3(right_shapes):
    def entries(data, key="shape", make=tuple, all_of_it=False):
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        return {
            name: make(entry.get(key, ()))
            for name, entry in header.items()
            if all_of_it or name != "__metadata__"
        }

    def each(of):
        return lambda data: {name: of(shape) for name, shape in right_shapes(data).items()}

    return {
        "`__metadata__` is no tensor: leave it out": lambda data:
            entries(data, all_of_it=True),
        "the shapes, not the offsets": lambda data: entries(data, "data_offsets"),
        "the shapes, not the offsets, and as tuples": lambda data:
            entries(data, "data_offsets", list),
        "the shapes, not the dtypes": lambda data: entries(data, "dtype", str),
        "only the names are there: name → shape": lambda data: list(right_shapes(data)),
        "only the shapes are there: name → shape": lambda data:
            list(right_shapes(data).values()),
        "name → shape, not shape → name": lambda data:
            {shape: name for name, shape in right_shapes(data).items()},
        "the shape, not how many numbers it makes": each(math.prod),
        "the shape, not how many axes it has": each(len),
        "the shape in its own order, not backwards": each(lambda shape: shape[::-1]),
        "a tuple of whole numbers, not a string": each(str),
    }


def exercise_7_1():
    return {
        "the warm-up begins at 1 / warm, not at 0": lambda s, n, w, c:
            min(1, s / w, (n - s) / c),
        "there is no warm-up": lambda s, n, w, c: min(1, (n - s) / c),
        "there is no fall at the end": lambda s, n, w, c: min(1, (s + 1) / w),
        "it stays at 1 at most": lambda s, n, w, c: min((s + 1) / w, (n - s) / c),
        "it falls over the last `cool` steps, not from the beginning": lambda s, n, w, c:
            min(1, (s + 1) / w, (n - s) / n),
        "it falls over the last `cool` steps, not from the warm-up on": lambda s, n, w, c:
            min(1, (s + 1) / w, (n - s) / (n - w)),
        "the last step is at 1 / cool, not at 0": lambda s, n, w, c:
            min(1, (s + 1) / w, (n - 1 - s) / c),
        "a cosine: this one is linear": lambda s, n, w, c:
            min(1, (s + 1) / w) * (1 + math.cos(math.pi * s / n)) / 2,
        "the smallest of the three, not their product": lambda s, n, w, c:
            (s + 1) / w * ((n - s) / c),
        "the smallest of the three, not the largest": lambda s, n, w, c:
            max(1, (s + 1) / w, (n - s) / c),
        "warm-up and fall are exchanged": lambda s, n, w, c:
            min(1, (s + 1) / c, (n - s) / w),
        "`/`, not `//`: the latter gives whole numbers": lambda s, n, w, c:
            min(1, (s + 1) // w, (n - s) // c),
    }


def exercise_7_2():
    return {
        "they are shifted already: the loss does that": lambda p, a:
            [-100] * (p - 1) + a,
        "they are shifted already, and filled up: the loss does that": lambda p, a:
            [-100] * (p - 1) + a + [-100],
        "the end of the answer counts, too": lambda p, a: [-100] * p + a[:-1] + [-100],
        "the end of the answer is part of it": lambda p, a: [-100] * p + a[:-1],
        "the prompt has its place, too: -100 for each of its ids": lambda p, a: a,
        "what does not count is -100, not 0": lambda p, a: [0] * p + a,
        "what does not count is -100, not -1": lambda p, a: [-1] * p + a,
        "what does not count is -100, not 100": lambda p, a: [100] * p + a,
        "the answer comes behind the prompt": lambda p, a: a + [-100] * p,
        "the answer counts, the prompt does not: you have it the other way round":
            lambda p, a: list(range(p)) + [-100] * len(a),
        "-100 for each id of the prompt, not once": lambda p, a: [-100, *a],
        "-100 for each id of the prompt, not of the answer": lambda p, a: [-100] * len(a) + a,
        "one -100 too many": lambda p, a: [-100] * (p + 1) + a,
        "nothing counts": lambda p, a: [-100] * (p + len(a)),
        "one list of numbers, not a list within it": lambda p, a: [-100] * p + [a],
    }


def exercise_7_3(WANTED):
    said = {
        "form": "as `Is it red?`, with a colour of the world, and yes or no",
        "true": "if its own colour is asked for, the answer is yes",
        "others": "if another colour is asked for, the answer is no",
        "every colour": "the others name every other colour, not always the same",
        "half": "about half are to be yes",
    }
    better = {
        ("true", "others"):
            "yes and no are exchanged, or come by chance: look at the thing",
        ("half",): "about half are to be yes; drawn from all six alike, it is one in six",
        ("true", "others", "half"):
            "yes and no come by chance, or are exchanged, and half are to be yes",
    }
    found = {}
    for size in range(1, len(WANTED) + 1):
        for lacking in itertools.combinations(WANTED, size):  # whatever may be wrong together
            words = better.get(lacking, "; ".join(said[name] for name in lacking))
            found[words] = lambda things, rng, lacking=lacking: (
                WANTED | dict.fromkeys(lacking, False)
            )
    return found


def exercise_8_1():
    def counted(
        positions=lambda rows, columns, side: side**2 + rows * (columns + 1),
        trim=True, odd=True, both=True, upright=True, to=int, pixels=False, turned=False,
    ):  # fmt: skip
        """The answer, or one with a mistake."""

        def kept(edge, shown):
            gone = (edge - shown) // 2
            return edge - gone * (1 + both) if odd else shown

        def count(height, width, grid, side):
            rows, columns = grid if pixels else (edge // 336 * side for edge in grid)
            if trim and (width / height > columns / rows) != turned:
                rows = kept(rows, to(round(height * (columns / width), 7)))
            elif trim and upright:
                columns = kept(columns, to(round(width * (rows / height), 7)))
            return positions(rows, columns, side)

        return count

    return {
        "the newlines are missing: one ends each row of the map":
            counted(lambda rows, columns, side: side**2 + rows * columns),
        "the black rows or columns are still there": counted(trim=False),
        "the black is still there, and the newlines are missing":
            counted(lambda rows, columns, side: side**2 + rows * columns, trim=False),
        "of an odd number of black rows or columns one stays": counted(odd=False),
        "the whole picture stands in front of its map: its side² are missing":
            counted(lambda rows, columns, side: rows * (columns + 1)),
        "the whole picture has no newlines, only the map has":
            counted(lambda rows, columns, side: side * (side + 1) + rows * (columns + 1)),
        "the whole picture does not end in a newline, only each row of the map does":
            counted(lambda rows, columns, side: side**2 + 1 + rows * (columns + 1)),
        "a newline ends each row: there is one for the whole map":
            counted(lambda rows, columns, side: side**2 + rows * columns + 1),
        "a newline ends each row: you have one for each column":
            counted(lambda rows, columns, side: side**2 + (rows + 1) * columns),
        "the newlines are one column more, and not one row more as well":
            counted(lambda rows, columns, side: side**2 + (rows + 1) * (columns + 1)),
        "grid is in pixels: 336 of them are `side` features": counted(pixels=True),
        "height and width are exchanged": lambda height, width, grid, side:
            counted()(width, height, grid, side),
        "grid is (height, width): you exchanged them": lambda height, width, grid, side:
            counted()(height, width, grid[::-1], side),
        "an upright picture has black columns: only rows are trimmed": counted(upright=False),
        "black is on both sides: you trimmed one": counted(both=False),
        "a picture wider than its grid has black rows: you trimmed the columns":
            counted(turned=True),
        "a newline ends each row of the map, not of each tile; and the black goes":
            lambda height, width, grid, side:
            (1 + grid[0] // 336 * (grid[1] // 336)) * side * (side + 1),
        "what a picture covers is rounded down, not up": counted(to=math.ceil),
        "that is LLaVA-1.5: the tiles come behind the whole": lambda height, width, grid, side:
            side**2,
    }  # fmt: skip


def exercise_8_2():
    def arranged(order, flat=False):
        """The axes (high, wide, side, side, D) in another order."""

        def join(x, high, wide, side):
            x = x.view(high, wide, side, side, -1).permute(*order, 4)
            x = x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])
            return x.flatten(0, 1) if flat else x

        return join

    def by_columns(x, high, wide, side):
        x = x.view(wide, high, side, side, -1).transpose(0, 1)
        return x.permute(0, 2, 1, 3, 4).reshape(high * side, wide * side, -1)

    right = arranged((0, 2, 1, 3))
    return {
        "it is tile behind tile: row 0 of the map is row 0 of each tile of the first row":
            lambda x, high, wide, side: x.reshape(high * side, wide * side, -1),
        "tiles go column by column, not row by row": by_columns,
        "within a tile features go column by column, not row by row": arranged((0, 3, 1, 2)),
        "`high` counts the rows of tiles, `wide` their columns: you exchanged the axes":
            lambda x, high, wide, side: x.view(high, wide, side, side, -1)
            .permute(1, 2, 0, 3, 4).reshape(high * side, wide * side, -1),
        "the columns of the tiles take turns: those of one stay together":
            arranged((0, 2, 3, 1)),
        "the rows of upper and lower tiles take turns: those of one stay together":
            arranged((2, 0, 1, 3)),
        "all tiles stand below one another: `wide` of them make a row":
            lambda x, high, wide, side: x.reshape(-1, side, x.shape[-1]),
        "all tiles stand side by side: after `wide` of them a new row begins":
            lambda x, high, wide, side: arranged((2, 0, 1, 3))(x, 1, high * wide, side),
        "a row of the map goes through all tiles of a row: exchange axes 1 and 2, not 2 and 3":
            lambda x, high, wide, side: x.view(high, wide, side, side, -1).transpose(2, 3)
            .reshape(high * side, wide * side, -1),
        "tiles of a row stand side by side, rows of tiles below: it is the other way round":
            lambda x, high, wide, side: torch.cat(
                [row.reshape(wide * side, side, -1) for row in x.view(high, wide, side, side, -1)],
                1,
            ),
        "it is (columns, rows, D), and should be (rows, columns, D)":
            lambda x, high, wide, side: right(x, high, wide, side).transpose(0, 1),
        "the map keeps its rows: (rows, columns, D), not one row of all":
            arranged((0, 2, 1, 3), flat=True),
        "D comes last: (rows, columns, D)":
            lambda x, high, wide, side: right(x, high, wide, side).permute(2, 0, 1),
        "the tiles are there, not joined: two axes too many":
            lambda x, high, wide, side: x.view(high, wide, side, side, -1),
        "upper tiles stand above, left ones at the left: they are backwards":
            lambda x, high, wide, side: right(x.flip(0), high, wide, side),
    }


def exercise_8_3():
    def picked(
        key=lambda shown, spare: (shown, -spare),
        shown_of=lambda width, height: int(width) * int(height), of=min, enlarged=False, last=False,
    ):  # fmt: skip
        """The answer, or one with a mistake."""

        def choose(height, width, grids):
            def merit(grid):
                scale = of(grid[0] / height, grid[1] / width)
                shown = shown_of(width * scale, height * scale)
                shown = shown if enlarged else min(shown, height * width)
                return key(shown, grid[0] * grid[1] - shown)

            return max(reversed(grids) if last else grids, key=merit)

        return choose

    def smallest(height, width, grids):
        fit = [grid for grid in grids if grid[0] >= height and grid[1] >= width]
        return min(fit, key=math.prod, default=None)

    def nearest(height, width, grids):
        return min(grids, key=lambda grid: abs(grid[1] / grid[0] - width / height))

    return {
        "of equals it takes the last": picked(last=True),
        "enlarging a picture shows no more of it": picked(enlarged=True),
        "the least to spare comes second": picked(lambda shown, spare: (-spare, shown)),
        "among equals the least to spare, not the first": picked(lambda shown, spare: shown),
        "among equals the least to spare, not the last": picked(lambda shown, spare: shown, last=True),
        "by what shows of the picture, not by the nearest size": lambda height, width, grids:
            min(grids, key=lambda grid: abs(grid[0] - height) + abs(grid[1] - width)),
        "the most of the picture comes first: this is the least to spare alone":
            picked(lambda shown, spare: -spare, enlarged=True),
        "a picture larger than every grid is scaled down: there is always one": smallest,
        "the least to spare, not the most": picked(lambda shown, spare: (shown, spare)),
        "the most pixels, not the fewest": picked(lambda shown, spare: (-shown, -spare)),
        "the whole picture has to fit: the smaller of the two scales": picked(of=max),
        "the pixels are whole: both sides are rounded down":
            picked(shown_of=lambda width, height: width * height),
        "both sides are rounded down, not to the nearest":
            picked(shown_of=lambda width, height: round(width) * round(height)),
        "grids are (height, width): you exchanged the sides of the picture":
            lambda height, width, grids: picked()(width, height, grids),
        "(height, width) of the grid: they are exchanged":
            lambda height, width, grids: picked()(height, width, grids)[::-1],
        "by pixels, not by the shape: the nearest shape may be small": nearest,
        "the largest grid has most to spare: look at what shows of the picture":
            lambda height, width, grids: max(grids, key=math.prod),
        "it is always the first": lambda height, width, grids: grids[0],
        "the grid itself, not its place in the list": lambda height, width, grids:
            list(grids).index(picked()(height, width, grids)),
    }


def exercise_9_1():
    def those(one, two):
        return lambda name, stage: name.startswith((one, two)[stage - 1])

    eye, bridge, voice = "vision", "projector", "llama"
    return {
        "in stage 2 the projector goes on learning, beside the voice": those(bridge, voice),
        "in stage 2 the voice learns, too": those(bridge, bridge),
        "in stage 1 the voice is frozen": those((bridge, voice), (bridge, voice)),
        "the eye stays frozen, in stage 2 as well": those(bridge, ""),
        "the eye stays frozen: it is the voice that learns in stage 2":
            those(bridge, (bridge, eye)),
        "the eye stays frozen in both stages": those((eye, bridge), (eye, bridge, voice)),
        "the two stages are exchanged": those((bridge, voice), bridge),
        "the voice is all of llama: embedding, blocks, norm and head":
            those(bridge, (bridge, "llama.blocks")),
        "True is what learns, not what is frozen": lambda n, s:
            not those(bridge, (bridge, voice))(n, s),
        "some of it is frozen": those("", ""),
        "something learns": lambda n, s: False,
    }


def exercise_9_2():
    def target(word=lambda x: x.mean(0), all_of_it=lambda x: x.sum(0) / len(x) ** 0.5):
        def of(words, table):
            return all_of_it(torch.stack([word(table[ids]) for ids in words]))

        return of

    def in_one(bottom):
        return lambda words, table: (
            table[[i for word in words for i in word]].sum(0) / bottom(words)
        )

    return {
        "divided by the root of their number, not by their number: it would be too short":
            target(all_of_it=lambda x: x.mean(0)),
        "divided by the root of the number of words": target(all_of_it=lambda x: x.sum(0)),
        "a word of several pieces is their mean, not their sum":
            in_one(lambda words: len(words) ** 0.5),
        "a word of several pieces is their mean: there each piece counts as a word":
            in_one(lambda words: sum(map(len, words)) ** 0.5),
        "first the mean of each word's pieces, then the sum over words, by its root":
            in_one(lambda words: sum(map(len, words))),
        "of a word of several pieces only the first is there": target(lambda x: x[0]),
        "of a word of several pieces only the last is there": target(lambda x: x[-1]),
        "the sum over the words is missing: there is one row for each":
            target(all_of_it=lambda x: x),
        "the root of the number of words, not of the width": target(
            all_of_it=lambda x: x.sum(0) / x.shape[1] ** 0.5
        ),
        "the sum, not the product": target(all_of_it=lambda x: x.prod(0)),
        "only the first of the words is there": target(all_of_it=lambda x: x[0]),
    }


def exercise_9_3():
    def measure(change=lambda d: d.mean(), error=lambda d: d.std(correction=0) / len(d) ** 0.5):
        def of(own, other):
            d = torch.tensor(own).double() - torch.tensor(other).double()
            return float(change(d)), float(error(d))

        return of

    def apart(own, other):
        x, y = torch.tensor(own).double(), torch.tensor(other).double()
        error = ((x.var(correction=0) + y.var(correction=0)) / len(x)) ** 0.5
        return float(x.mean() - y.mean()), float(error)

    def first(own, other):
        share = sum(own) / len(own)
        return measure()(own, other)[0], (share * (1 - share) / len(own)) ** 0.5

    return {
        "the same questions were asked twice: take the spread of the differences, not of each":
            apart,
        "the spread of the differences, not of the first list alone": first,
        "divide the spread by the root of the number of questions":
            measure(error=lambda d: d.std(correction=0)),
        "by the root of the number of questions, not by the number":
            measure(error=lambda d: d.std(correction=0) / len(d)),
        "the root of the variance is missing":
            measure(error=lambda d: d.var(correction=0) / len(d)),
        "the spread divides by n here, not by n - 1 (correction=0)":
            measure(error=lambda d: d.std() / len(d) ** 0.5),
        "own minus other, not the other way round": lambda own, other:
            measure()(other, own),
        "the share of the questions, not how many": measure(change=lambda d: d.sum()),
        "what was right with the other picture has to be taken away": lambda own, other:
            (sum(own) / len(own), measure()(own, other)[1]),
        "as a share, not in percent": lambda own, other:
            tuple(100 * x for x in measure()(own, other)),
        "the standard error, not 95 %: without the 1.96":
            measure(error=lambda d: 1.96 * d.std(correction=0) / len(d) ** 0.5),
        "first the difference, then its standard error": lambda own, other:
            measure()(own, other)[::-1],
    }
