"""Small models that we train ourselves: one design choice is changed, and spike and sink are watched.

`config` says what a run is, `model` is the decoder, `data` what it is trained on, `train` how, `families` which runs
there are, and `records` what is kept of them; `run` trains what is missing (`spikesink lab`). `findings` compares what
the records hold; a difference is a `changes.Change`.
"""
