"""Networks on a path: the frozen teacher, the student, their averages and experts, and how a student is sampled.

``denoiser.py`` is a network with what is needed to read it; ``teacher.py`` and ``student.py`` are its two uses;
``roles.py`` says who else there is and on which weights each lies, ``lora.py`` how several share one network's;
``find.py`` and ``loading.py`` lead from a name to a pipeline. Losses and everything above may come in.
"""
