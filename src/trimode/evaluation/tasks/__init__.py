"""Tasks with exact grading: what to ask, and a function from an answer to a grade. Offline, from files or from a seed."""

from trimode.evaluation.tasks.interface import Example, Grade, Task
from trimode.evaluation.tasks.opening import TASKS, open_tasks

__all__ = ["TASKS", "Example", "Grade", "Task", "open_tasks"]
