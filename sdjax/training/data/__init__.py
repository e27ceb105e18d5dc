"""What a training run is shown: pictures and captions read, checked, cut, encoded once, and put into batches.

folders, shards -> examples, all of them checked -> buckets of one shape -> latents and text states on the disk
-> batches, each a function of the seed and its number alone
"""
