"""The compact convolutional transformer (CCT) of Hassani et al., arXiv:2104.05704.

Sub-modules carry the names of the reference implementation, so published CCT weights load as they are.
"""

import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# blocks -> (embedding width d, heads, FF width / d), as in the reference implementation
SIZES = {
    2: (128, 2, 1), 4: (128, 2, 1), 6: (256, 4, 2), 7: (256, 4, 2), 8: (256, 4, 2), 14: (384, 6, 3), 16: (384, 6, 3),
}  # fmt: skip
POSITIONAL_EMBEDDINGS = ("learnable", "sine", "none")


def attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, fused: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention of each head; q, k, v and the result are (B, H, N, d/H), mask (B, N) bool: tokens that may be
    attended to.

    `fused` takes PyTorch's kernel, otherwise the three products are written out; the numbers agree.
    """
    if fused:
        keys = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)
    return F.dropout(attention_map(q, k, mask), dropout) @ v


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention weights (B, H, N, N), each row a distribution over the tokens attended to."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention (MHSA): x (B, N, d) -> (B, N, d).

    Node k of the concatenated heads (the input of `proj`) belongs to head k // (d/H).
    """

    def __init__(self, width: int, heads: int, attention_dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def split_heads(self, qkv: Tensor) -> Tensor:
        """Output of the qkv layer (B, N, 3d) -> (3, B, H, N, d/H)."""
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split_heads(self.qkv(x))
        # On CPUs the written-out products beat the fused kernel in bf16, but for many tokens without gradients.
        many = q.shape[2] >= 256 and not torch.is_grad_enabled()
        fused = many or q.device.type != "cpu" or q.dtype != torch.bfloat16
        heads = attention(q, k, v, self.attention_dropout if self.training else 0.0, fused, mask)
        return self.proj(heads.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """One encoder: x (B, N, d) -> (B, N, d).

    x = LN_1(x + DropPath(MHSA(LN_pre(x)))), then x + DropPath(W2 GELU(W1 x + b1) + b2):
    the FF residual starts from the normalised stream.
    """

    def __init__(self, width: int, heads: int, ff_width: int, attention_dropout: float, drop_path: float):
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, attention_dropout)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, ff_width)
        self.activation = nn.GELU()
        self.linear2 = nn.Linear(ff_width, width)
        self.drop_path = drop_path

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rate = self.drop_path if self.training else 0.0
        x = self.norm1(x + drop_path(self.self_attn(self.pre_norm(x), mask), rate))
        return x + drop_path(self.linear2(self.activation(self.linear1(x))), rate)


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Stochastic depth: the branch (B, N, d) of each image is dropped with probability `rate`, else scaled up."""
    if rate == 0.0:
        return branch
    # Written out because torchvision's, which does the same, takes seconds to import.
    kept = torch.empty(len(branch), 1, 1, device=branch.device, dtype=branch.dtype).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


class Tokenizer(nn.Module):
    """Convolutional stem: images (B, 3, S, S) -> tokens (B, N, d)."""

    def __init__(self, kernel: int, convs: int, width: int, hidden: int = 64):
        super().__init__()
        self.conv_layers = nn.Sequential()
        for a, b in pairwise([3] + [hidden] * (convs - 1) + [width]):
            conv = nn.Conv2d(a, b, kernel, max(1, kernel // 2 - 1), max(1, kernel // 2), bias=False)
            # The reference's ReLU comes before the pooling: the same numbers and gradients from four times the work.
            self.conv_layers.append(nn.Sequential(conv, nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU()))

    @torch.no_grad()
    def tokens(self, image_size: int) -> int:
        """Number of tokens of a square image."""
        weight = self.conv_layers[0][0].weight
        return self(weight.new_zeros(1, weight.shape[1], image_size, image_size)).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_layers(x).flatten(2).transpose(1, 2)


class TransformerClassifier(nn.Module):
    """Encoders, LayerNorm, SeqPool and classifier: tokens (B, N, d) -> logits (B, labels). A mask (B, N) bool says
    which tokens are there; None: all.

    token_share below 1 lets the encoders see, in training mode only, a random share of each image's tokens.
    """

    token_share = 1.0

    def __init__(
        self,
        blocks: int,
        width: int,
        heads: int,
        ff_width: int,
        tokens: int,
        num_classes: int,
        positional_embedding: str,
        attention_dropout: float,
        stochastic_depth: float,
    ):
        super().__init__()
        if positional_embedding == "learnable":
            self.positional_emb = nn.Parameter(torch.empty(1, tokens, width))
        elif positional_embedding == "sine":
            self.register_buffer("positional_emb", sine_embedding(tokens, width))
        else:
            self.positional_emb = None
        rates = [stochastic_depth * index / max(1, blocks - 1) for index in range(blocks)]
        shape = (width, heads, ff_width, attention_dropout)
        self.blocks = nn.ModuleList(EncoderBlock(*shape, rate) for rate in rates)
        self.norm = nn.LayerNorm(width)
        self.attention_pool = nn.Linear(width, 1)
        self.weighed = nn.Identity()  # a place to tap: tokens as SeqPool weighs them
        self.fc = nn.Linear(width, num_classes)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens plus position, what encoder 1 reads: (B, N, d) -> (B, N, d)."""
        if self.positional_emb is not None:
            # In the tokens' precision: a sum with fp32 positions would put the whole stream of a bf16 step into fp32.
            tokens = tokens + self.positional_emb.to(tokens.dtype)
        return tokens

    def classify(self, stream: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last encoder's output (B, N, d) -> logits (B, labels), through LayerNorm, SeqPool and the classifier."""
        x = self.norm(stream)
        scores = self.attention_pool(x)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
        weighed = self.weighed(scores.softmax(dim=1) * x)  # SeqPool: a weighted mean over tokens
        return self.fc(weighed.sum(dim=1))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        stream = self.embed(tokens)
        if self.training and self.token_share < 1:
            stream = random_tokens(stream, self.token_share)
        for block in self.blocks:
            stream = block(stream, mask)
        return self.classify(stream, mask)


class CCT(nn.Module):
    """A compact convolutional transformer: images (B, C, S, S), normalised -> logits (B, labels). Use `cct`."""

    def __init__(self, tokenizer: Tokenizer, classifier: TransformerClassifier):
        super().__init__()
        self.tokenizer = tokenizer
        self.classifier = classifier

    def mask(self, x: Tensor) -> None:
        """All tokens of an image are there."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tokenizer(x))


def cct(
    name: str,
    num_classes: int,
    image_size: int = 32,
    positional_embedding: str = "learnable",
    heads: int | None = None,
    attention_dropout: float = 0.1,
    stochastic_depth: float = 0.1,
) -> CCT:
    """Build `cct_<blocks>_<kernel>x<convs>` with freshly drawn weights (from torch's global generator).

    blocks is one of 2, 4, 6, 7, 8, 14, 16 and sets width, heads and FF width (`SIZES`); `heads` replaces the number
    of heads. Defaults and initialisation are the reference's: linear layers truncated normal 0.02 with zero bias,
    convolutions Kaiming, learnable positions truncated normal 0.2, stochastic depth rising linearly from 0.
    Raises ValueError for a name or number that gives no such network.
    """
    match = re.fullmatch(r"cct_(\d+)_(\d+)x(\d+)", name)
    if not match or int(match[1]) not in SIZES or 0 in (int(match[2]), int(match[3])):
        raise ValueError(f"unknown model {name!r}: use cct_<blocks>_<kernel>x<convs> with blocks in {sorted(SIZES)}")
    if positional_embedding not in POSITIONAL_EMBEDDINGS:
        raise ValueError(
            f"unknown positional_embedding {positional_embedding!r}: use one of {', '.join(POSITIONAL_EMBEDDINGS)}"
        )
    blocks, kernel, convs = (int(number) for number in match.groups())
    width, default_heads, ratio = SIZES[blocks]
    heads = heads or default_heads
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width} of {name}: use a divisor of {width}")
    tokenizer = Tokenizer(kernel, convs, width)
    shape = (blocks, width, heads, ratio * width, tokenizer.tokens(image_size), num_classes)
    classifier = TransformerClassifier(*shape, positional_embedding, attention_dropout, stochastic_depth)
    network = CCT(tokenizer, classifier)
    network.apply(initialise)
    if positional_embedding == "learnable":
        nn.init.trunc_normal_(classifier.positional_emb, std=0.2)
    return network


def random_tokens(tokens: Tensor, share: float) -> Tensor:
    """A random share of each image's tokens, at least one: (B, N, d) -> (B, round(share * N), d)."""
    kept = torch.rand(tokens.shape[:2], device=tokens.device).topk(max(1, round(share * tokens.shape[1]))).indices
    return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))


def sine_embedding(tokens: int, width: int) -> Tensor:
    """Fixed sine/cosine positions, (1, N, d), in -1..1."""
    channel = torch.arange(width)
    angle = torch.arange(tokens)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None]


def initialise(module: nn.Module) -> None:
    """Draw the weights of one module as the reference does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
