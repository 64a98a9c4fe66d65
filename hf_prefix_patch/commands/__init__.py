"""The commands of the command line.

run         a training script with prefix sharing
"""
