"""Training: the step, the loop around it, and what a run writes.

loop         `fit`: trains, evaluates, saves; resumes
step         the training step, a pure function of state and batch
batches      each process's rows, placed on the mesh
optim        optimisers and the schedule of the learning rate
head_weights  weights of heads in the loss, by step
evaluations  held-out measures and text samples during a run
provenance   versions, and the fingerprint of a model
workdir      the files of a run; loading a trained model
resume       which settings may change when a run resumes
lock         one run at a time per workdir
report       what a run reports: settings, steps, its end
terminal     lines and a progress bar on standard output
logs         CSV, TensorBoard events, samples
metrics      speed, FLOP/s, profiles
processes    several processes as one run; signals
"""
