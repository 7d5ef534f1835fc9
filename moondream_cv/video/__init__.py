"""Video: sources of frames, detection now and then, tracking in between, drawing and writing.

    from moondream_cv.video import track, annotate_video

Names are imported when they are first used.
"""
