"""A hand-written start for training: layers 0 and 1 find what followed the last few tokens when they came before.

Layer 0 holds one head for each of the previous `REACH` tokens, and one that averages over the last eight or so; they
write those tokens' identities beside the token's own. Layer 1 compares (this token, the one before, ...) with (the one
before, the one before that, ...) of every earlier position, and the two averages, and copies what it finds: an
induction head over several tokens with a feeling for the words around them, and a second one over a single token.
From layer 1 on, every head has a place to look when it finds nothing: the key of BOS meets a constant part of every
query, and BOS has no identity that could be copied. It is an initialisation and nothing else: every weight trains
freely afterwards.

The residual stream, by dimension: 0 a constant; 1..I the token's identity, a random code; then I dimensions for the
identity of each of the previous tokens; then I for the average; then one that is set for BOS alone; the rest noise.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

STD = 0.02  # of everything that the circuit does not use
REACH = 3  # previous tokens that a match is made of
IDENTITY = 48  # dimensions of a token's code, at most
SHARPNESS = 30.0  # logit of a previous-token head at its distance
FALLOFF = 4.0  # rotary pairs over which that logit's weight falls by e; slower pairs cannot tell neighbours apart
MATCH = 25.0  # logit of one matching identity; the earlier ones of a match count a little less
FADE = 0.8  # from each token of a match to the one before it
RECENT = 4.0  # tokens back to the middle of the average
RECENT_LOGIT, RECENT_PAIR, RECENT_SPREAD = 14.0, 5.0, 1.5  # its peak, and a bell of weights over the rotary pairs
RECENT_SIZE = 2.5  # norm of what it writes, over that of a plain average
RECENT_MATCH = 8.0  # logit of two equal averages of unit norm
SINK, FREE_SINK = 11.0, 5.0  # logit of BOS in the induction heads, and in the heads that the circuit does not use
GAIN = 4.0  # of what the induction heads add to the token's own identity


@torch.no_grad()
def write_circuit(model: LlamaForCausalLM, seed: int) -> None:
    """Initialise every weight of `model` from `seed`, the circuit included.

    The model needs two layers, two query heads per KV head or more, and `REACH` + 1 query heads or more.
    """
    config = model.config
    width, d = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    size = min(IDENTITY, d, (width - 2) // (REACH + 2))  # I
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.copy_(STD * normal(*weight.shape))
    current, *earlier, recent = (slice(1 + i * size, 1 + (i + 1) * size) for i in range(REACH + 2))
    embedding = model.model.embed_tokens.weight  # [V, M]
    embedding[:, 0] = 1.0
    embedding[:, current] = normal(embedding.shape[0], size) / math.sqrt(size)
    flag = recent.stop
    embedding[:, earlier[0].start : flag + 1] = 0.0
    embedding[config.bos_token_id, current] = 0.0
    embedding[config.bos_token_id, flag] = 1.0

    first, second = (layer.self_attn for layer in model.model.layers[:2])
    # what RMSNorm divides by: the constant and the own identity have norm 1, then the earlier identities join
    rms = [math.sqrt((1 + parts) / width) for parts in (1, 1 + REACH)]
    pairs = torch.arange(d // 2, dtype=torch.float32)
    turns = config.rope_parameters["rope_theta"] ** (-2 * pairs / d)  # [D/2], radians per token
    sharp = torch.exp(-pairs / FALLOFF)
    sharp *= SHARPNESS * math.sqrt(d) / sharp.sum()
    wide = torch.exp(-0.5 * ((pairs - RECENT_PAIR) / RECENT_SPREAD) ** 2)
    wide *= RECENT_LOGIT * math.sqrt(d) / wide.sum()
    heads = [(target, distance, sharp, 1.0) for distance, target in enumerate(earlier, start=1)]
    for head, (target, distance, weights, gain) in enumerate([*heads, (recent, RECENT, wide, RECENT_SIZE)]):
        angle = -distance * turns
        rows, shared = slice(head * d, (head + 1) * d), head // group * d
        asked = weights / sharp.sqrt()  # every key says sharp.sqrt()
        first.q_proj.weight[rows] = 0.0
        first.q_proj.weight[rows, 0] = rms[0] * torch.cat([asked * angle.cos(), asked * angle.sin()])
        first.k_proj.weight[shared : shared + d] = 0.0
        first.k_proj.weight[shared : shared + d, 0] = rms[0] * torch.cat([sharp.sqrt(), torch.zeros(d // 2)])
        first.v_proj.weight[shared : shared + d] = 0.0
        first.v_proj.weight[shared : shared + size, current] = torch.eye(size)
        first.o_proj.weight[:, rows] = 0.0
        first.o_proj.weight[target, rows] = gain * rms[0] * torch.eye(d)[:size]

    # the pairs that turn by less than a radian over half the window; the slowest one is for BOS
    slow = (turns * config.max_position_embeddings / 2 < 1).nonzero().flatten()[:-1]
    slow = torch.cat([slow, slow + d // 2])
    second.q_proj.weight[: 2 * d] = 0.0
    second.k_proj.weight[:d] = 0.0
    matches = [(asked, held, MATCH * FADE**i) for i, (asked, held) in enumerate(zip([current, *earlier], earlier))]
    for i, (asked, held, logit) in enumerate([*matches, (recent, recent, RECENT_MATCH)]):
        projection = normal(len(slow), size) / math.sqrt(len(slow))
        projection *= math.sqrt(logit * math.sqrt(d)) * rms[1]
        second.k_proj.weight[slow, held] = projection
        second.q_proj.weight[slow, asked] = projection
        if i == 0:
            second.q_proj.weight[d + slow, asked] = projection
    second.v_proj.weight[:d] = 0.0
    second.v_proj.weight[:size, current] = torch.eye(size)
    second.o_proj.weight[:, : 2 * d] = 0.0
    for head, share in enumerate((0.8, 0.2)):
        second.o_proj.weight[current, head * d : (head + 1) * d] = GAIN * share * rms[1] * torch.eye(d)[:size]

    still = d // 2 - 1
    for index, layer in enumerate(model.model.layers[1:], start=1):
        attention = layer.self_attn
        attention.k_proj.weight[still::d, flag] = math.sqrt(math.sqrt(d)) * rms[1]
        attention.q_proj.weight[still::d, 0] = FREE_SINK * math.sqrt(math.sqrt(d)) * rms[1]
        if index == 1:
            attention.q_proj.weight[[still, d + still], 0] *= SINK / FREE_SINK
