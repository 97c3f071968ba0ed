"""One profile's settings -> trained networks -> readouts -> tables: the modules of the package, chained and stored.

Each function takes a run, computes what is missing (see `store.Run.stage`) and returns tidy tables, one row per
seed x network x encoder x tap x variant.
"""

from paperlib.experiment import division as division
from paperlib.experiment import hand as hand
from paperlib.experiment import heads as heads
from paperlib.experiment import late as late
from paperlib.experiment import measure as measure
from paperlib.experiment import networks as networks
from paperlib.experiment import nodes as nodes
from paperlib.experiment import pruning as pruning
from paperlib.experiment import readings as readings
from paperlib.experiment import sets as sets
from paperlib.experiment import single as single
from paperlib.experiment.settings import card as card
from paperlib.experiment.settings import open_run as open_run
from paperlib.experiment.settings import results as results
