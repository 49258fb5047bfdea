"""The page of ``reelquant serve``: forms, a queue of jobs, clips side by side, evaluations.

``folder`` decides which files may be opened and ``guard`` which requests are answered. ``commands`` makes the words of a job, ``jobs``
keeps its record, ``work`` runs one after the other in processes of their own. ``plan`` shows what a job would do, ``comparisons`` are
pairs of clips with votes, ``evaluations`` lists reports. ``page`` holds the forms (gradio), ``routes`` the rest of what is answered,
``server`` binds the socket, and ``assets/`` runs in the browser.

Nothing here imports torch: only the command line opens models, in the processes of the jobs.
"""
