"""From a checkpoint to an archive that DJLServing serves, and what it meets there."""
