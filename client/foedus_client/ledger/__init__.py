"""What each dataset has spent and may still spend, durably; knows no training and no link."""
