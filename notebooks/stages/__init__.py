"""The stages of a walk: one profile's settings -> trained networks -> readouts -> tables.

Each function takes a run, computes what is missing (see `runs.Run.stage`) and returns tidy tables, one row per
seed x network x encoder x tap x variant. Raise a stage's version when the meaning of its artefact changes.
"""

from stages.division import (
    attention_maps,
    cooperation,
    head_clusters,
    head_counts,
    head_division,
    more_heads,
    owners_of_superclasses,
    stability,
    summary_of_cooperation,
    summary_of_heads,
)
from stages.networks import NETWORKS, build_network, cnn_half, learning_curves, load_network, recipe, train
from stages.nodes import (
    SUPERCLASSES,
    TAP_COLUMNS,
    accuracy_and_snr,
    after_the_last_encoder,
    both_halves,
    chosen_nodes,
    cluster_pairs,
    correct_answers,
    driving_images,
    example_node,
    examples,
    macroscopic_accuracies,
    matrices,
    moved_by_more_epochs,
    node_gallery,
    penalties,
    places_first_middle_last,
    predictions_by_size,
    readout,
    snr,
    summary_of_taps,
    superclasses,
    trained_readouts,
)
from stages.pruned import (
    DRAWN,
    input_norms,
    label_sets,
    multiply_adds,
    pruned_readouts,
    pruning,
    sets_at,
    signs_of_filters,
    summary_of_readouts,
    unpruned,
    why_ff,
    why_filters,
)
