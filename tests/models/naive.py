"""The decoder's formulas in float64, one row and one head at a time.

It shares the configuration classes with the library and nothing else.
"""

import jax
import numpy as np

from jaxscale.models.config import ExpertsConfig, SparseMixerRouter


def layer_params(params, config, number):
    """The parameters of one layer, taken from its place in the prefix or in the stacks."""
    num_before = len(config.prefix)
    if number < num_before:
        return params["prefix"][str(number)]
    period, position = divmod(number - num_before, config.period)
    return jax.tree.map(lambda leaf: leaf[period], params["layers"][str(position)])


class Naive:
    """A model's forward; `params` is the tree of the library."""

    def __init__(self, params, config):
        self.params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        self.config = config

    def logits(self, batch):
        """Logits [B, T, V] of rows of tokens, positions and segments [B, T]."""
        columns = (np.asarray(batch[name]) for name in ("tokens", "positions", "segments"))
        return np.stack([self.row(*row) for row in zip(*columns)])

    def row(self, tokens, positions, segments):
        p, config = self.params, self.config
        x = p["embedding"]["tokens"][tokens]
        if config.use_learned_positions:
            x = x + p["embedding"]["positions"][positions]
        for number, layer in enumerate(config.layers):
            x = self.layer(layer_params(p, config, number), layer, x, positions, segments)
        table = p["embedding"]["tokens"] if config.is_tied else p["head"]["weights"]
        logits = self.norm(p["final_norm"], x) @ table.T
        if config.use_head_bias:
            logits = logits + p["head"]["bias"]
        return softcapped(logits, config.logit_softcap)

    def layer(self, p, layer, x, positions, segments):
        is_before = layer.norm_position in ("before", "both")
        is_after = layer.norm_position in ("after", "both")
        attention, ffn = p["attention"], p["moe" if layer.is_moe else "ffn"]
        h = self.norm(attention["norm"], x) if is_before else x
        y = self.attention(attention, layer.attention, h, positions, segments)
        if is_after:
            y = self.norm(attention["norm_after"], y)
        if layer.is_parallel:
            return x + y + self.feed_forward(ffn, layer.feed_forward, h)
        x = x + y
        h = self.norm(ffn["norm"], x) if is_before else x
        y = self.feed_forward(ffn, layer.feed_forward, h)
        return x + (self.norm(ffn["norm_after"], y) if is_after else y)

    def norm(self, p, x):
        config = self.config.norm
        if config.kind == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon) * p["scale"]
        return y + p["bias"] if config.use_bias else y

    def attention(self, p, config, h, positions, segments):
        t = np.arange(len(h))
        sees = segments[:, None] == segments
        if self.config.is_causal:
            sees = sees & (t[:, None] >= t) & (t[:, None] - t < (config.window or len(h)))
        lengths = np.array([(segments == each).sum() for each in segments])
        q, k, v = (self.heads(p, config, name, h, positions, lengths) for name in "qkv")
        y = p["o_bias"] if "o" in config.biases else 0
        scale = config.scale or 1 / np.sqrt(config.head_dim)
        for n in range(config.num_heads):
            kv = n * config.num_kv_heads // config.num_heads
            weights = np.exp(softcapped(scale * q[n] @ k[kv].T, config.softcap)) * sees
            y = y + weights / weights.sum(-1, keepdims=True) @ v[kv] @ p["o"][n]
        return y

    def heads(self, p, config, name, h, positions, lengths):
        """Queries, keys or values, [heads, T, H]."""
        y = np.stack([h @ p[name][:, n] for n in range(p[name].shape[1])])
        if name in config.biases:
            y = y + p[f"{name}_bias"][:, None]
        if name == "v":
            return y
        if config.qk_norm == "head":
            y = self.norm(p[f"{name}_norm"], y)
        elif config.qk_norm == "all":
            num_heads, length, head_dim = y.shape
            joined = np.concatenate(list(y), -1)
            joined = self.norm({n: s.ravel() for n, s in p[f"{name}_norm"].items()}, joined)
            y = joined.reshape(length, num_heads, head_dim).swapaxes(0, 1)
        return y if config.rotary is None else rotated(y, positions, config.rotary, lengths)

    def feed_forward(self, p, config, h):
        if not isinstance(config, ExpertsConfig):
            return dense(p, config.activation, h)
        out = np.zeros_like(h)
        for t, token in enumerate(h):
            for e, gate in gates(config, token @ p["router"]):
                expert = {name: weights[e] for name, weights in p["experts"].items()}
                out[t] += gate * dense(expert, config.activation, token)
        return out


def softcapped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def rotated(x, positions, rotary, lengths):
    """Pairs of the first elements as complex numbers, turned by position times frequency."""
    size = int(x.shape[-1] * rotary.fraction)
    half = size // 2
    frequencies = rotary.theta ** (-np.arange(half) / half)
    magnitude = 1
    if scaling := rotary.scaling:  # LongRoPE
        is_long = (lengths > scaling.original_length)[:, None]
        factors = np.where(is_long, scaling.long_factors, scaling.factors)
        frequencies = frequencies / factors
        magnitude = np.where(is_long, scaling.long_magnitude, scaling.magnitude)
    angles = positions[:, None] * frequencies
    z = (x[..., :half] + 1j * x[..., half:size]) * np.exp(1j * angles) * magnitude
    return np.concatenate([z.real, z.imag, x[..., size:]], -1)


def dense(p, activation, h):
    up, gate = (h @ p[s] + p.get(f"{s}_bias", 0) if s in p else None for s in ("up", "gate"))
    x = up if gate is None else gate
    gelu = x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    activated = x / (1 + np.exp(-x)) if activation == "swiglu" else gelu
    hidden = activated if gate is None else activated * up
    return hidden @ p["down"] + p.get("down_bias", 0)


def gates(config, z):
    """(expert, gate) of each expert that a token with router logits z visits."""
    router = config.router
    chosen = np.argsort(-z)[: config.num_active]
    if not isinstance(router, SparseMixerRouter):
        is_divided = router.is_renormalised and len(chosen) > 1
        total = np.exp(z[chosen] if is_divided else z).sum()
        return [(e, np.exp(z[e]) / total) for e in chosen]
    found, left = [], list(range(len(z)))
    for e in chosen:  # the largest of those left
        near = [i for i in left if z[e] - z[i] <= router.threshold * (abs(z[i]) + abs(z[e]))]
        found.append((e, np.exp(z[e]) / np.exp(z[near]).sum()))
        left.remove(e)
    return found
