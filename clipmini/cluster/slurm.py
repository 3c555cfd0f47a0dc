"""Has SLURM start a job again that was stopped before its end."""

import logging
import os
import subprocess

log = logging.getLogger(__name__)

SCONTROL_SECONDS = 60


def requeue() -> bool:
    """Put the job that this process runs in back into the queue; by one process, after the checkpoint is complete.

    A job that its user cancels is left alone: SLURM would start it again.

    Returns:
        Whether SLURM took it; False outside of SLURM.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        state = read_state(job)
        if state != "RUNNING":
            log.info("SLURM job %s is %s, and is not put back into the queue", job, state)
            return False
        scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.error("SLURM job %s is not put back into the queue: %s", job, str(reason).strip())
        return False
    return True


def read_state(job: str) -> str:
    """Return a job's state: RUNNING also while it is preempted, COMPLETING when its user has cancelled it.

    Seen with SLURM 22.05.
    """
    fields = dict(field.partition("=")[::2] for field in scontrol("--oneliner", "show", "job", job).split())
    return fields.get("JobState", "unknown")


def scontrol(*arguments: str) -> str:
    """Run scontrol and return what it prints."""
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=True).stdout
