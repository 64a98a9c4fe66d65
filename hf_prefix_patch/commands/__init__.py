"""The commands of the command line.

run         a training script with prefix sharing
estimate    what sharing would gain on a data set
verify      shared against unshared results of a model
"""
