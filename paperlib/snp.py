"""Single-nodal performance (SNP): readout + class means -> fields -> Boolean matrices -> clusters -> signal and noise.

Shapes: L labels, T positions per node, D nodes of one tap. In every L x L matrix the row is the input label and the
column the output label. Where a definition comes from: `code` (the group's public code of the CNN version) or `choice`
(ours); see docs/deviations.md.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROTATIONS = 5  # draws of rotated nodes
CLUSTER_BYTES = 2**28  # memory for the cluster search of one chunk of nodes


def class_means(activations: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Mean activation of each label's images: (n, T, D), (n,) -> (L, T, D). ValueError if a label has none."""
    sums = activations.new_zeros(num_labels, *activations.shape[1:])
    class_sums(sums, activations, labels)
    return means_of(sums, labels.bincount(minlength=num_labels))


def class_sums(sums: Tensor, activations: Tensor, labels: Tensor) -> None:
    """Add a batch (n, T, D) to `sums` (L, T, D) in place. Sums add up across batches and devices, so one pass over the
    data serves all nodes at once."""
    sums.index_add_(0, labels, activations)


def means_of(sums: Tensor, counts: Tensor) -> Tensor:
    """Class sums (L, T, D) and images per label (L,) -> class means (L, T, D)."""
    if not counts.all():
        raise ValueError(f"label {(counts == 0).nonzero()[0].item()} has no image, so its mean does not exist")
    return sums / counts.view(-1, 1, 1)


def field_matrices(readout_weight: Tensor, class_means: Tensor) -> Tensor:
    """Output fields of each node alone, averaged over each label's images: (L, T, D), (L, T, D) -> (D, L, L).

    M_k[c, l] = sum_t W[l, t, k] * mean_c a[t, k]: what the readout would say if every weight but node k's were silenced
    (code; the exchange of mean and sum is exact because the readout is linear, and averaging instead of summing over
    images keeps unbalanced test sets right).
    """
    if readout_weight.shape != class_means.shape:
        raise ValueError(f"readout {tuple(readout_weight.shape)} and class means {tuple(class_means.shape)} differ")
    return torch.bmm(class_means.permute(2, 0, 1), readout_weight.permute(2, 1, 0))


def split_offset(fields: Tensor) -> tuple[Tensor, Tensor]:
    """(D, L, L) -> (centred fields (D, L, L), the offset's share of each node's squared norm (D,) in 0..1).

    The offset o_k[l] = mean over input labels of M_k[c, l] is the response that no input label causes (choice).
    """
    offset = fields.mean(dim=1, keepdim=True)
    norm = fields.square().sum(dim=(1, 2))
    share = offset.square().sum(dim=(1, 2)) * fields.shape[1] / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return fields - offset, share


def rotations(nodes: int, draws: int, generator: torch.Generator, groups: int = 1) -> Tensor:
    """Random orthogonal matrices over the nodes of a tap, within each of so many groups of equal size that lie side by
    side (heads): (draws, D, D). Rotated nodes are the null of single ones (choice): they carry the same information."""
    check_rotation(nodes, groups)
    size = nodes // groups
    normal = torch.randn(draws, groups, size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # so that all rotations are equally likely
    return torch.stack([torch.block_diag(*part) for part in q.float()])


def native_and_rotated(
    readout_weight: Tensor, class_means: Tensor, drawn: Iterable[Tensor]
) -> Iterator[tuple[str, bool, Tensor]]:
    """Fields of native nodes and of each rotation (D, D), raw and centred: (basis, centred, fields (D, L, L)); bases
    are native, rotated-0, rotated-1, ...."""
    fields = field_matrices(readout_weight, class_means)
    yield "native", False, fields
    yield "native", True, split_offset(fields)[0]
    for number, rotation in enumerate(drawn):
        fields = field_matrices(rotated(readout_weight, rotation), rotated(class_means, rotation))
        yield f"rotated-{number}", False, fields
        yield f"rotated-{number}", True, split_offset(fields)[0]


def check_rotation(nodes: int, groups: int = 1) -> None:
    """Raise ValueError if there is nothing to rotate."""
    if nodes < 2 * groups:
        raise ValueError(f"{nodes} nodes in {groups} groups leave nothing to rotate: a tap needs two nodes in each")


def rotated(values: Tensor, rotation: Tensor) -> Tensor:
    """Readout or class means (..., D) of rotated nodes. A readout and activations that are rotated alike answer as
    before, and as the L2 penalty does not see a rotation, a rotated optimum is the optimum for rotated nodes."""
    return values @ rotation.to(values)


def turns(rotation: Tensor, steps: int) -> Tensor:
    """The shortest way from native nodes to randomly rotated ones, in equal steps: (D, D) -> (steps, D, D), the first
    one the identity, all orthogonal. If the rotation mirrors, the last one differs from it in the sign of a node, which
    no field matrix sees. ValueError for a rotation within several groups, of which two may mirror."""
    rotation = rotation.double()
    if torch.linalg.det(rotation) < 0:  # there is no way to a mirror image
        rotation = torch.cat([-rotation[:, :1], rotation[:, 1:]], dim=1)
    values, vectors = torch.linalg.eig(rotation)
    back = torch.linalg.inv(vectors)
    powers = [(vectors * values.pow(share)) @ back for share in torch.linspace(0, 1, steps).tolist()]
    way = torch.stack(powers).real.float()
    if not torch.allclose(way @ way.mT, torch.eye(len(rotation)), atol=1e-3):
        raise ValueError("nodes turn within one group only: take a rotation of one head, or of a tap without heads")
    return way


def turned_node(readout_weight: Tensor, class_means: Tensor, way: Tensor, node: int) -> Tensor:
    """Field matrices of one node at every step of a way (steps, D, D): (L, T, D), (L, T, D) -> (steps, L, L)."""
    directions = way[:, :, node]
    return field_matrices(*(rotated(part, directions.T) for part in (readout_weight, class_means)))


def boolean_matrices(fields: Tensor, threshold: float = 0.3) -> Tensor:
    """(D, L, L) -> (D, L, L) bool: fields above `threshold` (in 0..1, strictly) times the node's own maximum (code).

    A node without a positive field has an empty matrix (choice: dividing by its maximum would flip every sign).
    Raises ValueError for a threshold outside (0, 1) or fields that are not finite.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold} must lie between 0 and 1")
    maximum = fields.amax(dim=(1, 2), keepdim=True)
    if not fields.isfinite().all():
        raise ValueError("a node's fields are not finite: the network or its readout has diverged")
    return (fields / maximum.where(maximum > 0, torch.inf)) > threshold


def diagonal_labels(booleans: Tensor) -> Tensor:
    """The labels each node recognises, D_k: (D, L, L) -> (D, L) bool."""
    return booleans.diagonal(dim1=1, dim2=2)


def cluster_labels(booleans: Tensor) -> Tensor:
    """(D, L, L) bool -> (D, L): number (from 0) of the cluster that holds each diagonal label, -1 for other labels.

    A label joins the first cluster whose members it confuses with itself both ways (block all ones), else it opens the
    next one; labels in ascending order (code: repeatedly taking the first unused label and adding every later one that
    fits gives the same clusters).
    """
    diagonal = diagonal_labels(booleans)
    nodes, labels = diagonal.shape
    mutual = booleans & booleans.transpose(1, 2)
    most = int(diagonal.sum(dim=1).max()) if nodes else 0
    cluster = torch.full((nodes, labels), -1, dtype=torch.long, device=booleans.device)
    # fits[k, j, l]: label l is mutually connected to all members of cluster j of node k (true of an empty cluster)
    fits = torch.ones(nodes, most, labels, dtype=torch.bool, device=booleans.device)
    for label in range(labels):
        joins = diagonal[:, label].nonzero().squeeze(1)
        if len(joins):
            first = fits[joins, :, label].to(torch.uint8).argmax(dim=1)
            cluster[joins, label] = first
            fits[joins, first] &= mutual[joins, label]
    return cluster


def label_clusters(boolean: Tensor) -> list[list[int]]:
    """Clusters of one node: (L, L) bool -> lists of labels, in the order in which they were opened."""
    cluster = cluster_labels(boolean[None])[0]
    return [(cluster == number).nonzero().squeeze(1).tolist() for number in range(int(cluster.max()) + 1)]


def clustered_pairs(booleans: Tensor) -> Tensor:
    """How many nodes hold both labels in one cluster: (D, L, L) bool -> (L, L) int64, 0 on the diagonal."""
    pairs = torch.zeros(booleans.shape[1:], dtype=torch.long, device=booleans.device)
    for cluster in cluster_labels(booleans):
        pairs += (cluster[:, None] == cluster) & (cluster >= 0)
    return pairs.fill_diagonal_(0)


def mutual_confusions(booleans: Tensor) -> Tensor:
    """Mutual confusions of each node, found and by chance: (D, L, L) bool -> (D, 2).

    Ordered pairs of labels that the node recognises and that answer to each other; by chance, if the ones off the
    diagonal lay at random with their row and column sums (`chance_factors`). Pooled over nodes, the quotient says
    whether the labels of a cluster belong together (choice)."""
    diagonal = diagonal_labels(booleans)
    row_factors, column_factors = chance_factors(booleans)
    most = int(diagonal.sum(dim=1).max()) if len(booleans) else 0
    own = diagonal.int().topk(most, dim=1).indices  # few labels of many: the rest is not looked at
    known = diagonal.gather(1, own)
    pairs = known[:, :, None] & known[:, None] & ~torch.eye(most, dtype=torch.bool, device=own.device)
    among = own[:, :, None].expand(-1, -1, booleans.shape[2]), own[:, None].expand(-1, most, -1)
    ones = booleans.gather(1, among[0]).gather(2, among[1])
    chance = (row_factors.gather(1, own)[:, :, None] * column_factors.gather(1, own)[:, None]).clamp(max=1)
    found = (ones & ones.mT & pairs).sum(dim=(1, 2)), (chance * chance.mT * pairs).sum(dim=(1, 2))
    return torch.stack(found, dim=1)


def chance_factors(booleans: Tensor, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """Factors of rows and of columns (D, L) whose products, off the diagonal, have the matrices' own row and column
    sums there: quasi-independence, by iterative proportional fitting. A node that answers the same labels to every
    image has its own matrix as the product, so that all its confusions are by chance."""
    diagonal = diagonal_labels(booleans).float()
    rows, columns = (booleans.sum(dim=dim, dtype=torch.float32) - diagonal for dim in (2, 1))
    a, b = rows, (columns > 0).float()
    for _ in range(rounds):
        a = rows / (b.sum(dim=1, keepdim=True) - b).clamp(min=1e-6)
        b = columns / (a.sum(dim=1, keepdim=True) - a).clamp(min=1e-6)
    return a, b


def own_noise(booleans: Tensor) -> Tensor:
    """Each node's noise in the columns of labels that it recognises: (D, L, L) bool -> (D,) int64 (code)."""
    diagonal = diagonal_labels(booleans)
    return (booleans.sum(dim=1) * diagonal).sum(dim=1) - diagonal.sum(dim=1)


def share_within(pairs: Tensor, groups: Tensor) -> float:
    """Share of clustered pairs (L, L) whose labels are of one group (L,); nan without pairs."""
    return _quotient(float(pairs[groups[:, None] == groups].sum()), float(pairs.sum()))


def order_spread(booleans: Tensor, orders: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clusters per node and pooled cluster size with the labels in random orders: two (orders,) tensors. Only they
    depend on the order of labels, as clusters are searched greedily."""
    found = []
    for _ in range(orders):
        order = torch.randperm(booleans.shape[1], generator=generator)
        statistics = tap_statistics(booleans[:, order][:, :, order])
        found.append((statistics.clusters_per_node, statistics.pooled_cluster_size))
    return torch.tensor(found).unbind(dim=1)


@dataclass(frozen=True)
class NodeStatistics:
    """One entry per node, all (D,) int64."""

    labels: Tensor  # |D_k| = sum of cluster sizes = trace of B_k
    clusters: Tensor  # N_c
    internal: Tensor  # internal noise: off-diagonal ones inside clusters, sum of s (s - 1)
    external: Tensor  # external noise: ones outside all clusters


def node_statistics(booleans: Tensor) -> NodeStatistics:
    """Cluster statistics of every node: (D, L, L) bool -> four (D,) tensors (code)."""
    # A cluster search takes up to L times L bytes a node, as much again as its matrix: nodes go in chunks.
    chunks = booleans.split(max(1, CLUSTER_BYTES // booleans[0].numel())) if len(booleans) else [booleans]
    parts = [_chunk_statistics(chunk) for chunk in chunks]
    return NodeStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _chunk_statistics(booleans: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cluster = cluster_labels(booleans)
    most = int(cluster.max()) + 1 if cluster.numel() else 0
    sizes = torch.stack([(cluster == number).sum(dim=1) for number in range(most)] or [cluster.sum(dim=1) * 0], dim=1)
    labels = sizes.sum(dim=1)
    internal = (sizes * (sizes - 1)).sum(dim=1)
    ones = booleans.flatten(1).sum(dim=1)
    return labels, (sizes > 0).sum(dim=1), internal, ones - labels - internal


def measured_nodes(
    readout_weight: Tensor, class_means: Tensor, threshold: float = 0.3, chunk: int = 64
) -> tuple[NodeStatistics, Tensor]:
    """Readout and class means (L, T, D) -> statistics and diagonal labels (D, L) of every node, without keeping all
    matrices: a chunk of nodes takes about 20 L^2 bytes a node."""
    parts = []
    for weight, means in zip(readout_weight.split(chunk, dim=2), class_means.split(chunk, dim=2), strict=True):
        booleans = boolean_matrices(field_matrices(weight, means), threshold)
        parts.append((*_chunk_statistics(booleans), diagonal_labels(booleans).clone()))
    *statistics, diagonal = (torch.cat(values) for values in zip(*parts, strict=True))
    return NodeStatistics(*statistics), diagonal


@dataclass(frozen=True)
class TapStatistics:
    """Statistics of one tap (floats). Means are over all nodes; nan where a quotient does not exist."""

    signal: float  # S: nodes that recognise a label, mean over labels
    noise: float  # N: nodes that answer label l to inputs of another label c, mean over pairs l != c
    snr: float  # S / N
    snr_external: float  # S / N with the external noise alone
    clusters_per_node: float
    pooled_cluster_size: float  # labels in clusters / clusters, over all nodes together
    labels_per_node: float
    internal_noise: float
    external_noise: float
    nodes_with_cluster: float  # share of nodes, 0..1


def tap_statistics(booleans: Tensor) -> TapStatistics:
    """(D, L, L) bool -> statistics of the tap (choice: S and N are built from quantities that the group reports)."""
    return summarise(node_statistics(booleans), booleans.shape[1])


def summarise(nodes: NodeStatistics, num_labels: int) -> TapStatistics:
    """Statistics of a tap from those of its nodes."""
    count = len(nodes.labels)
    totals = (nodes.labels, nodes.clusters, nodes.internal, nodes.external)
    labels, clusters, internal, external = (float(total.sum()) for total in totals)
    pairs = num_labels * (num_labels - 1)
    signal = labels / num_labels
    noise, noise_external = (_quotient(part, pairs) for part in (internal + external, external))
    per_node = {"clusters_per_node": clusters, "labels_per_node": labels}
    per_node |= {"internal_noise": internal, "external_noise": external}
    return TapStatistics(
        signal=signal,
        noise=noise,
        snr=_quotient(signal, noise),
        snr_external=_quotient(signal, noise_external),
        pooled_cluster_size=_quotient(labels, clusters),
        nodes_with_cluster=_quotient(float((nodes.clusters > 0).sum()), count),
        **{name: _quotient(value, count) for name, value in per_node.items()},
    )


def snr(booleans: Tensor) -> float:
    """SNR of a tap as in `tap_statistics`, counted without a search for clusters: (D, L, L) bool -> S / N."""
    labels, ones = int(diagonal_labels(booleans).sum()), int(booleans.sum())
    return _quotient(labels * (booleans.shape[1] - 1), ones - labels)


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.nan


def chosen_nodes(nodes: NodeStatistics) -> dict[str, int]:
    """A typical node (labels nearest to the median, among those with a cluster of two or more) and extreme ones."""
    distance = (nodes.labels - nodes.labels.float().median()).abs() + 1e6 * (nodes.internal == 0)
    largest = nodes.labels.float() / nodes.clusters.clamp(min=1)
    chosen = {"typical": distance.argmin(), "fewest labels": nodes.labels.where(nodes.labels > 0, 10**6).argmin()}
    chosen |= {"most labels": nodes.labels.argmax(), "largest clusters": largest.argmax()}
    return {what: int(node) for what, node in chosen.items()}
