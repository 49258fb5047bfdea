"""The docs site: pages that are written from the code (:mod:`website.generate`), and links out of ``docs/`` (:mod:`website.hooks`)."""
