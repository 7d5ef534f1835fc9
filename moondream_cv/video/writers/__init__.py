"""Writers of frames and detections: video files, JSON lines, MOT, and a window."""
