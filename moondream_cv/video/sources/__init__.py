"""Sources of frames: video files, image folders, animations, webcams and network streams."""
