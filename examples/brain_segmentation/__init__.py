"""A 3-D U-Net of `Conv3D` and `Conv3DTranspose`, trained to segment a real MRI. Run `make demo`.

A training loop to copy: it can be killed at any moment and goes on to the bit where it was.

cli.py          arguments, and the run from data to report
settings.py     what decides a run's outcome
data.py         the MNI152 brain, or a user's NIfTI files; the front/back split
patches.py      patches by (seed, step); augmentation
model.py        the network
train.py        state and step: loss, mixed precision, clipping, schedule, accumulation, moving average
devices.py      a mesh of devices: batches and patches cut over it
loop.py         steps, evaluations, saves; stopping and going on
checkpoints.py  orbax: asynchronous, the best and the last few, proved when read
logs.py         CSV and TensorBoard
inference.py    a whole volume by overlapping windows
evaluate.py     labels and Dice
report.py       table, segmented NIfTI, parameters
figure.py       the picture of planes and curves
measure.py      the measurements behind the choice of the network's parts
"""
