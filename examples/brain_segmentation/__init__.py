"""A 3-D U-Net whose decoder is `Conv3DTranspose`, trained to segment a real MRI. Run `make demo`.

cli.py       arguments, and the run from data to report
data.py      the MNI152 brain, or a user's NIfTI files; the front/back split; patches
model.py     the network
train.py     loss, step, loop
evaluate.py  labels for a whole volume, Dice
report.py    table, segmented NIfTI, parameters
figure.py    the picture of planes and loss
measure.py   the measurements behind the choice of the network's parts
"""
