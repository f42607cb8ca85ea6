"""What the learned controllers learn from, and their fitting: collection, costs of widths, networks, validation.

Using a controller needs none of this: it is loaded by `helpers.policies`. Pretraining of the embedded models and their
card are in `helpers.training.pretraining` and `.model_card`, to be imported by these names: they load accelerate.
"""

from helpers.training.allocation import optimal_bits, rate_distortion
from helpers.training.collection import collect
from helpers.training.commit import LossWeights, commit_tasks, save_commit, train_commit
from helpers.training.controllers import train_controllers, write_controller_card
from helpers.training.costs import COST_COLUMNS, load_or_measure_costs, measure_costs, texts_of
from helpers.training.cross_validation import cross_fit, cross_validate_settle, held_out, shuffled_drops
from helpers.training.exact import exact_costs
from helpers.training.fisher import fisher_costs, head_costs
from helpers.training.rule import RULE_SHARES, calibrate_rule
from helpers.training.settle import SETTLE_LABEL, SettleExamples, settle_examples, train_settle
from helpers.training.table import ASSIGNMENT_COLUMNS, check_training_data, read_training_data, summarise

__all__ = [
    "ASSIGNMENT_COLUMNS", "COST_COLUMNS", "RULE_SHARES", "SETTLE_LABEL", "LossWeights", "SettleExamples",
    "calibrate_rule", "check_training_data", "collect", "commit_tasks", "cross_fit", "cross_validate_settle",
    "exact_costs", "fisher_costs", "head_costs", "held_out", "load_or_measure_costs", "measure_costs", "optimal_bits",
    "rate_distortion", "read_training_data", "save_commit", "settle_examples", "shuffled_drops", "summarise",
    "texts_of", "train_commit", "train_controllers", "train_settle", "write_controller_card",
]  # fmt: skip
