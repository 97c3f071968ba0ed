"""Images and labels: everything that is trained on or measured becomes uint8 tensors and, from these, batches."""

from paperlib.data.augmentation import augmented_batches as augmented_batches
from paperlib.data.images import BATCH as BATCH
from paperlib.data.images import EMBEDDED as EMBEDDED
from paperlib.data.images import PADDING as PADDING
from paperlib.data.images import Images as Images
from paperlib.data.images import Inputs as Inputs
from paperlib.data.images import balanced as balanced
from paperlib.data.images import channel_statistics as channel_statistics
from paperlib.data.images import held_out as held_out
from paperlib.data.images import hold_out as hold_out
from paperlib.data.images import limit as limit
from paperlib.data.images import normalise as normalise
from paperlib.data.images import positions as positions
from paperlib.data.images import ranked as ranked
from paperlib.data.sources import NAMES as NAMES
from paperlib.data.sources import SPLITS as SPLITS
from paperlib.data.sources import TEXTS as TEXTS
from paperlib.data.sources import check_name as check_name
from paperlib.data.sources import load as load
from paperlib.data.text import Texts as Texts
