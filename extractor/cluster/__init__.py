"""Workers: processes of Ray on this machine or on a cluster, and the blocks that are in flight."""
