"""The page of ``reelquant serve``: forms, a queue of jobs, clips side by side, evaluations.

``folder`` decides which files may be opened, ``commands`` makes the words of a job, ``jobs`` keeps its record, ``work`` runs one after the
other in processes of their own, ``comparisons`` are pairs of clips with votes, ``evaluations`` lists reports, ``plan`` shows what a job would
do, ``routes`` and ``guard`` answer requests, ``page`` holds the forms (gradio), ``server`` binds the socket, ``assets/`` is what runs in the
browser.

Nothing here imports torch: models are opened by the command line alone, in the processes of the jobs.
"""
